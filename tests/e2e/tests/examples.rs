//! The three examples a newcomer runs, through kubectl, controller, node agent, microVM, far-init and tiffany.

use far_e2e::far_or_skip;
use far_testkit::{find, skip};

fn example(name: &str) -> String {
    find::repository()
        .join("examples")
        .join(name)
        .to_string_lossy()
        .into_owned()
}

#[test]
fn the_seeds_yaml_runs_to_completed_by_kubectl_and_its_output_is_visible() {
    const TEST: &str = "the_seeds_yaml_runs_to_completed_by_kubectl_and_its_output_is_visible";
    if let Err(missing) = find::kubectl() {
        return skip(TEST, &missing);
    }
    let Some(far) = far_or_skip(TEST) else { return };
    let applied = far.kubectl(&["apply", "-f", &example("embedder.yaml")]).ok();
    assert!(applied.contains("embedder-worker-01 created"), "{applied}");
    let _ = far
        .kubectl(&[
            "wait",
            "--for=jsonpath={.status.phase}=Completed",
            "--timeout=180s",
            "faragent/embedder-worker-01",
        ])
        .ok();

    let status = far.agent("embedder-worker-01")["status"].clone();
    assert_eq!(status["phase"], "Completed");
    assert_eq!(status["exitCode"], 0);
    assert_eq!(status["reason"], "Completed");
    assert_eq!(status["attempt"], 1);
    assert!(status["nodeName"].is_string(), "{status}");
    assert!(
        status["imageDigest"]
            .as_str()
            .is_some_and(|digest| digest.starts_with("sha256:")),
        "{status}"
    );

    for output in [
        far.far(&["logs", "embedder-worker-01"]).ok(),
        far.kubectl(&["far", "logs", "embedder-worker-01"]).ok(),
    ] {
        assert!(output.lines().any(|line| line.contains("\"vector\"")), "{output}");
    }
    let table = far.kubectl(&["get", "fa"]).ok();
    assert!(table.contains("PHASE") && table.contains("Completed"), "{table}");
    let described = far.kubectl(&["describe", "fa", "embedder-worker-01"]).ok();
    assert!(
        described.contains("Exit Code:") && described.contains("Scheduled"),
        "{described}"
    );
    let _ = far
        .kubectl(&["delete", "fa", "embedder-worker-01", "--timeout=60s"])
        .ok();
    far.nothing_of_a_vm_is_left();
    far.stop();
}

#[test]
fn documents_from_a_config_map_are_embedded_and_counted() {
    let Some(far) = far_or_skip("documents_from_a_config_map_are_embedded_and_counted") else {
        return;
    };
    let _ = far.far(&["apply", "-f", &example("embed-docs.yaml")]).ok();
    let agent = far.wait_end("embed-docs");
    assert_eq!(agent["status"]["phase"], "Completed", "{agent}");
    let errors = far.far(&["logs", "embed-docs", "--stderr"]).ok();
    assert!(
        errors.contains("embedded ") && errors.contains(" chunks of "),
        "{errors}"
    );
    assert!(!errors.contains("self-test"), "the documents did not arrive: {errors}");
    let vectors = far.far(&["logs", "embed-docs", "--stdout"]).ok();
    assert!(vectors.lines().count() >= 2, "{vectors}");
    far.stop();
}

#[test]
fn the_failing_example_is_failed_with_exit_code_three() {
    let Some(far) = far_or_skip("the_failing_example_is_failed_with_exit_code_three") else {
        return;
    };
    let _ = far.far(&["apply", "-f", &example("fails.yaml")]).ok();
    let agent = far.wait_end("fails");
    assert_eq!(agent["status"]["phase"], "Failed", "{agent}");
    assert_eq!(agent["status"]["reason"], "Error");
    assert_eq!(agent["status"]["exitCode"], 3);
    let run = far.far(&["run", &example("fails.yaml")]);
    assert_eq!(run.code, 3, "far run ends with the agent's exit code: {run:?}");
    far.stop();
}
