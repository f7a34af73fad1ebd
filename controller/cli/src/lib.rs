//! The user's commands: far and kubectl-far.
