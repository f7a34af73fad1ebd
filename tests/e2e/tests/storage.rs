//! Room for an agent's own files: `spec.volumes` and `spec.scratch`, from the YAML to the guest's kernel.

use far_e2e::{far_or_skip, payload_agent_with};

#[test]
fn folders_and_the_layer_over_the_image_are_as_large_as_the_spec_says() {
    const TEST: &str = "folders_and_the_layer_over_the_image_are_as_large_as_the_spec_says";
    let Some(far) = far_or_skip(TEST) else { return };
    let more = "  scratch:\n    sizeLimit: 3Mi\n  volumes:\n  - name: work\n    mountPath: /room\n    emptyDir:\n      sizeLimit: 2Mi\n";
    far.apply(&payload_agent_with("fills", &["fill=/room/a", "fill=/b"], more));
    let agent = far.wait_end("fills");
    assert_eq!(agent["status"]["phase"], "Completed", "{agent}");
    let output = far.far(&["logs", "fills"]).ok();
    assert!(output.contains("/room/a took 2048 KiB\n"), "{output}");
    let layer = output
        .lines()
        .find_map(|line| line.strip_prefix("/b took "))
        .expect("the second line");
    let kib: u64 = layer.trim_end_matches(" KiB").parse().expect("a number");
    // What far-init wrote there takes some of it.
    assert!((2700..=3072).contains(&kib), "{output}");

    let more = "  volumes:\n  - name: work\n    mountPath: /room\n    emptyDir:\n      sizeLimit: 1Gi\n";
    far.apply(&payload_agent_with("greedy", &["exit=0"], more));
    let agent = far.wait_end("greedy");
    assert_eq!(agent["status"]["phase"], "Failed", "{agent}");
    let message = agent["status"]["message"].as_str().unwrap_or_default();
    assert!(message.contains("spec.volumes[0].emptyDir.sizeLimit"), "{agent}");
    far.nothing_of_a_vm_is_left();
    far.stop();
}
