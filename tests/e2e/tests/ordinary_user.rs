//! Everything as an ordinary user: no capability, vsock and no NIC, said openly.

use far_e2e::{far_with_or_skip, payload_agent};
use far_testkit::{Options, skip};

/// nobody on Debian and Ubuntu.
const NOBODY: u32 = 65534;

#[test]
fn an_ordinary_user_gets_a_completed_agent_and_is_told_why_there_is_no_nic() {
    const TEST: &str = "an_ordinary_user_gets_a_completed_agent_and_is_told_why_there_is_no_nic";
    if std::fs::metadata("/proc/self")
        .map(|meta| std::os::unix::fs::MetadataExt::uid(&meta))
        .ok()
        != Some(0)
    {
        return skip(
            TEST,
            "this run is an ordinary user's already: every other test shows the same",
        );
    }
    let Some(far) = far_with_or_skip(
        TEST,
        Options {
            user: Some(NOBODY),
            ..Options::default()
        },
    ) else {
        return;
    };
    far.apply(&payload_agent("modest", &["out=hello", "exit=0"]));
    let agent = far.wait_end("modest");
    assert_eq!(agent["status"]["phase"], "Completed", "{agent}");
    let resources = agent["status"]["resources"].to_string();
    assert!(
        resources.contains("CAP_NET_ADMIN"),
        "the status says why there is no NIC: {resources}"
    );
    far.stop();
}
