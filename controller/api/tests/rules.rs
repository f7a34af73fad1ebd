//! The CEL rules without a server: what a user can get wrong, and that the message names the field.

use far_api::crds;
use kube_cel::Validator;
use serde_json::{Value, json};

fn check(spec: &Value, old: Option<&Value>) -> Vec<String> {
    let crd = serde_json::to_value(&crds()[0]).expect("a CRD is plain data");
    let schema = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
    let object = |spec: &Value| json!({"apiVersion": "tiffany.dev/v1", "kind": "FarAgent", "metadata": {"name": "a"}, "spec": spec});
    let old = old.map(object);
    match Validator::new().validate_with_defaults(schema, &object(spec), old.as_ref()) {
        Ok(()) => Vec::new(),
        Err(errors) => errors.into_iter().map(|error| error.message).collect(),
    }
}

#[test]
fn good_specs_pass() {
    for spec in [
        json!({"image": "a"}),
        json!({"image": "a", "memory": "512Mi", "cpu": 1}),
        json!({"image": "a", "memory": 536_870_912, "cpu": "500m"}),
        json!({"image": "a", "memory": "900Ti", "cpu": 5000}),
        json!({"image": "a", "restartPolicy": "OnFailure", "backoffLimit": 2, "lostPolicy": "Reschedule", "suspend": true}),
        json!({"image": "a", "network": {"egress": [{"cidr": "192.0.2.0/24", "ports": [{"port": 443}]},
            {"cidr": "2001:db8::/32"}, {"dnsName": "api.example.com", "ports": [{"port": 53, "endPort": 54, "protocol": "UDP"}]}]}}),
        json!({"image": "a", "network": {"mode": "Open"}, "scratch": {"sizeLimit": "64Mi"},
            "volumes": [{"name": "work", "mountPath": "/work", "emptyDir": {}}], "resources": {"nvidia.com/gpu": 1}}),
        json!({"image": "a", "tolerations": [{"operator": "Exists"}, {"key": "gpu", "value": "x", "effect": "NoSchedule"}],
            "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms":
            [{"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a", "b"]}]}]}}}}),
        json!({"image": "a", "envFrom": [{"secretRef": {"name": "s"}, "prefix": "S_"}], "poolRef": {"name": "p"}}),
        json!({"image": "a", "env": [{"name": "A"}, {"name": "B", "value": "x=y"},
            {"name": "C", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]}),
        json!({"image": "a", "files": [{"path": "/task", "configMapRef": {"name": "docs"}},
            {"path": "/etc/..hidden", "inline": ""}, {"path": "/a.b/c", "secretKeyRef": {"name": "s", "key": "k"}}]}),
    ] {
        assert_eq!(check(&spec, None), Vec::<String>::new(), "{spec}");
    }
}

#[test]
fn bad_specs_are_refused_and_the_message_names_the_field() {
    for (why, spec, field) in [
        ("memory zero", json!({"image": "a", "memory": 0}), "spec.memory"),
        (
            "memory below the smallest guest",
            json!({"image": "a", "memory": "1Mi"}),
            "spec.memory",
        ),
        (
            "memory negative",
            json!({"image": "a", "memory": "-512Mi"}),
            "spec.memory",
        ),
        (
            "memory no quantity",
            json!({"image": "a", "memory": "lots"}),
            "spec.memory",
        ),
        (
            "memory with a unit nobody knows",
            json!({"image": "a", "memory": "512MiB"}),
            "spec.memory",
        ),
        (
            "egress to nowhere",
            json!({"image": "a", "network": {"egress": [{}]}}),
            "spec.network.egress[]",
        ),
        (
            "egress that is no prefix",
            json!({"image": "a", "network": {"egress": [{"cidr": "192.0.2.1"}]}}),
            "spec.network.egress[].cidr",
        ),
        (
            "egress to a name with a space",
            json!({"image": "a", "network": {"egress": [{"dnsName": "a b"}]}}),
            "spec.network.egress[].dnsName",
        ),
        (
            "rules where all is open",
            json!({"image": "a", "network": {"mode": "Open", "egress": [{"dnsName": "a"}]}}),
            "spec.network.egress",
        ),
        (
            "a range that ends before it begins",
            json!({"image": "a", "network": {"egress": [{"dnsName": "a", "ports": [{"port": 5, "endPort": 4}]}]}}),
            "spec.network.egress[].ports[].endPort",
        ),
        (
            "a limit of what is never done",
            json!({"image": "a", "backoffLimit": 1}),
            "spec.backoffLimit",
        ),
        (
            "a warm agent that takes another over",
            json!({"image": "a", "startPolicy": "OnClaim", "poolRef": {"name": "p"}}),
            "spec.poolRef",
        ),
        (
            "two sources of variables",
            json!({"image": "a", "envFrom": [{"secretRef": {"name": "s"}, "configMapRef": {"name": "c"}}]}),
            "spec.envFrom[]",
        ),
        (
            "scratch of nothing",
            json!({"image": "a", "scratch": {"sizeLimit": "0"}}),
            "spec.scratch.sizeLimit",
        ),
        (
            "a volume outside",
            json!({"image": "a", "volumes": [{"name": "w", "mountPath": "/../etc", "emptyDir": {}}]}),
            "spec.volumes[].mountPath",
        ),
        (
            "a toleration of nothing",
            json!({"image": "a", "tolerations": [{"value": "x"}]}),
            "spec.tolerations[]",
        ),
        (
            "an expression without values",
            json!({"image": "a", "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution":
                {"nodeSelectorTerms": [{"matchExpressions": [{"key": "zone", "operator": "In"}]}]}}}}),
            "spec.affinity",
        ),
        ("cpu zero", json!({"image": "a", "cpu": 0}), "spec.cpu"),
        ("cpu negative", json!({"image": "a", "cpu": -1}), "spec.cpu"),
        ("cpu no quantity", json!({"image": "a", "cpu": "fast"}), "spec.cpu"),
        ("image with a space", json!({"image": "a b"}), "spec.image"),
        (
            "relative entrypoint",
            json!({"image": "a", "entrypoint": "bin/x"}),
            "spec.entrypoint",
        ),
        (
            "relative working folder",
            json!({"image": "a", "workingDir": "x"}),
            "spec.workingDir",
        ),
        (
            "env name with =",
            json!({"image": "a", "env": [{"name": "A=B", "value": "x"}]}),
            "spec.env[].name",
        ),
        (
            "env with two values",
            json!({"image": "a", "env": [{"name": "A", "value": "x", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]}),
            "spec.env[]",
        ),
        (
            "env from nothing",
            json!({"image": "a", "env": [{"name": "A", "valueFrom": {}}]}),
            "spec.env[].valueFrom",
        ),
        (
            "files path with ..",
            json!({"image": "a", "files": [{"path": "/task/../etc", "inline": "x"}]}),
            "spec.files[].path",
        ),
        (
            "files path ending in ..",
            json!({"image": "a", "files": [{"path": "/task/..", "inline": "x"}]}),
            "spec.files[].path",
        ),
        (
            "files path with .",
            json!({"image": "a", "files": [{"path": "/task/./x", "inline": "x"}]}),
            "spec.files[].path",
        ),
        (
            "files path relative",
            json!({"image": "a", "files": [{"path": "task/x", "inline": "x"}]}),
            "spec.files[].path",
        ),
        (
            "files path with empty part",
            json!({"image": "a", "files": [{"path": "/task//x", "inline": "x"}]}),
            "spec.files[].path",
        ),
        (
            "files path is a folder",
            json!({"image": "a", "files": [{"path": "/task/", "inline": "x"}]}),
            "spec.files[].path",
        ),
        (
            "file without a source",
            json!({"image": "a", "files": [{"path": "/x"}]}),
            "spec.files[]",
        ),
        (
            "file with two sources",
            json!({"image": "a", "files": [{"path": "/x", "inline": "x", "configMapRef": {"name": "c"}}]}),
            "spec.files[]",
        ),
    ] {
        let messages = check(&spec, None);
        assert_eq!(messages.len(), 1, "{why}: exactly one message, got {messages:?}");
        assert!(
            messages[0].contains(field),
            "{why}: the message names no {field}: {messages:?}"
        );
    }
}

#[test]
fn what_decides_the_boot_is_immutable_also_where_it_was_absent() {
    let full = json!({"image": "a", "memory": "1Gi", "cpu": 2, "entrypoint": "/x", "args": ["1"], "workingDir": "/",
        "env": [{"name": "A", "value": "1"}], "files": [{"path": "/f", "inline": "1"}], "nodeName": "b"});
    let bare = json!({"image": "a", "memory": "1Gi", "cpu": 2});
    for (field, value) in [
        ("image", json!("b")),
        ("memory", json!("2Gi")),
        ("cpu", json!(3)),
        ("entrypoint", json!("/y")),
        ("args", json!(["2"])),
        ("workingDir", json!("/tmp")),
        ("env", json!([{"name": "A", "value": "2"}])),
        ("files", json!([{"path": "/f", "inline": "2"}])),
        ("nodeName", json!("c")),
    ] {
        let expected = vec![format!("spec.{field} is immutable")];
        let mut changed = full.clone();
        changed[field] = value.clone();
        assert_eq!(check(&changed, Some(&full)), expected, "{field} changed");
        let mut added = bare.clone();
        added[field] = value;
        if bare.get(field).is_none() {
            assert_eq!(check(&added, Some(&bare)), expected, "{field} added");
            assert_eq!(check(&bare, Some(&added)), expected, "{field} removed");
        }
    }
    assert_eq!(check(&full, Some(&full)), Vec::<String>::new());
}

#[test]
fn the_deadline_and_the_grace_period_may_change() {
    let old = json!({"image": "a", "terminationGracePeriodSeconds": 10});
    let new = json!({"image": "a", "terminationGracePeriodSeconds": 30, "activeDeadlineSeconds": 60});
    assert_eq!(check(&new, Some(&old)), Vec::<String>::new());
}
