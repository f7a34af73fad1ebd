//! Harness for real daemons and microVMs in tests.
