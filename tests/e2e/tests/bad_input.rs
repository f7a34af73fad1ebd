//! Every bad input that a user can give: the command or the status names the field, and nothing hangs or stays behind.

use far_e2e::{far_or_skip, payload_agent, payload_agent_with};
use serde_json::Value;

fn agent(name: &str, spec: &str) -> String {
    format!("apiVersion: tiffany.dev/v1\nkind: FarAgent\nmetadata:\n  name: {name}\nspec:\n{spec}\n")
}

#[test]
fn the_api_refuses_bad_fields_and_names_them() {
    let Some(far) = far_or_skip("the_api_refuses_bad_fields_and_names_them") else {
        return;
    };
    for (why, spec, field) in [
        ("memory zero", "  image: a\n  memory: 0\n", "memory"),
        ("memory negative", "  image: a\n  memory: -512Mi\n", "memory"),
        ("memory not a quantity", "  image: a\n  memory: lots\n", "memory"),
        ("cpu zero", "  image: a\n  cpu: 0\n", "cpu"),
        ("cpu negative", "  image: a\n  cpu: -1\n", "cpu"),
        ("cpu not a quantity", "  image: a\n  cpu: fast\n", "cpu"),
        (
            "env name with =",
            "  image: a\n  env: [{name: \"A=B\", value: x}]\n",
            "env",
        ),
        (
            "files path with ..",
            "  image: a\n  files: [{path: /task/../etc/passwd, inline: x}]\n",
            "files",
        ),
        (
            "files path relative",
            "  image: a\n  files: [{path: task/x, inline: x}]\n",
            "files",
        ),
        ("image missing", "  memory: 64Mi\n", "image"),
    ] {
        let text = far.far_with(&["apply", "-f", "-"], &agent("bad", spec)).err();
        assert!(text.contains(field), "{why}: the message names no {field}: {text}");
        assert_eq!(far.agent("bad"), Value::Null, "{why}: nothing is stored");
    }
    far.stop();
}

#[test]
fn a_change_of_an_immutable_field_is_refused_by_name() {
    let Some(far) = far_or_skip("a_change_of_an_immutable_field_is_refused_by_name") else {
        return;
    };
    far.apply(&payload_agent("fixed", &["exit=0"]));
    let text = far
        .far_with(&["apply", "-f", "-"], &payload_agent("fixed", &["exit=1"]))
        .err();
    assert!(text.contains("args") && text.contains("immutable"), "{text}");
    let _ = far.wait_end("fixed");
    far.stop();
}

#[test]
fn more_than_any_blade_has_stays_pending_and_counts_blades_by_cause() {
    let Some(far) = far_or_skip("more_than_any_blade_has_stays_pending_and_counts_blades_by_cause") else {
        return;
    };
    for (name, spec, cause) in [
        ("big-memory", "  image: a\n  memory: 900Ti\n", "memory"),
        ("big-cpu", "  image: a\n  cpu: 5000\n", "cpu"),
    ] {
        far.apply(&agent(name, spec));
        let seen = far.wait_agent(name, "to be judged", |status| {
            status["conditions"].as_array().is_some_and(|all| {
                all.iter()
                    .any(|one| one["type"] == "Scheduled" && one["status"] == "False")
            })
        });
        let text = seen["status"].to_string();
        assert_eq!(seen["status"]["phase"], "Pending", "{text}");
        assert!(text.contains("0/1 blades") && text.contains(cause), "{text}");
    }
    far.stop();
}

#[test]
fn an_unknown_image_and_a_missing_entrypoint_fail_and_name_the_field() {
    let Some(far) = far_or_skip("an_unknown_image_and_a_missing_entrypoint_fail_and_name_the_field") else {
        return;
    };
    far.apply(&agent("no-image", "  image: example.com/nobody/nothing:v9\n"));
    far.apply(&payload_agent_with(
        "no-entrypoint",
        &[],
        "  entrypoint: /no/such/program\n",
    ));
    let no_image = far.wait_end("no-image");
    assert_eq!(no_image["status"]["reason"], "ImageError", "{no_image}");
    assert!(
        no_image["status"]["message"]
            .as_str()
            .is_some_and(|text| text.contains("spec.image") && text.contains("nothing:v9")),
        "{no_image}"
    );
    let no_entrypoint = far.wait_end("no-entrypoint");
    assert_eq!(no_entrypoint["status"]["phase"], "Failed");
    assert!(
        no_entrypoint["status"]["message"]
            .as_str()
            .is_some_and(|text| text.contains("spec.entrypoint") && text.contains("/no/such/program")),
        "{no_entrypoint}"
    );
    far.nothing_of_a_vm_is_left();
    far.stop();
}
