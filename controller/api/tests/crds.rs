//! The CRDs as they are checked in: generated, explained field by field, and bounded.

use std::{fs, path::PathBuf};

use far_api::{FarAgent, crds, crds_yaml};
use serde_json::Value;

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn the_checked_in_crds_are_those_of_the_types() {
    for (name, text) in crds_yaml().unwrap() {
        let path = folder().join("crds").join(&name);
        if std::env::var_os("FAR_UPDATE_CRDS").is_some() {
            fs::write(&path, &text).unwrap();
        }
        let checked_in = fs::read_to_string(&path).unwrap_or_default();
        assert_eq!(
            checked_in, text,
            "{name} differs from the types: run the tests once with FAR_UPDATE_CRDS=1"
        );
        let back: Value = serde_saphyr::from_str(&text).unwrap();
        let object = crds()
            .into_iter()
            .find(|crd| format!("{}.yaml", crd.spec.names.plural) == name)
            .unwrap();
        assert_eq!(
            back,
            serde_json::to_value(object).unwrap(),
            "{name} is read back as it was written"
        );
    }
}

#[test]
fn the_install_file_is_its_base_with_the_crds_of_the_types() {
    let deploy = folder().join("../../deploy");
    let base = |name: &str| fs::read_to_string(deploy.join("base").join(name)).unwrap();
    let crds: Vec<String> = crds_yaml().unwrap().into_iter().map(|(_, text)| text).collect();
    // Namespaces and kinds before what is in them and of them.
    let mut parts = vec![base("namespaces.yaml")];
    parts.extend(crds);
    parts.extend([base("rbac.yaml"), base("gateway.yaml"), base("controller.yaml")]);
    let parts: Vec<_> = parts.iter().map(|part| part.trim_end()).collect();
    let text = format!(
        "# Made from deploy/base and the CRDs; change those.\n{}\n",
        parts.join("\n---\n")
    );
    let path = deploy.join("far.yaml");
    if std::env::var_os("FAR_UPDATE_CRDS").is_some() {
        fs::write(&path, &text).unwrap();
    }
    assert!(
        fs::read_to_string(&path).unwrap_or_default() == text,
        "deploy/far.yaml is not up to date: run the tests once with FAR_UPDATE_CRDS=1"
    );
}

#[test]
fn every_format_is_one_that_kubernetes_knows() {
    for (name, text) in crds_yaml().unwrap() {
        for line in text.lines().filter_map(|line| line.trim().strip_prefix("format: ")) {
            assert!(matches!(line, "int32" | "int64" | "date-time"), "{name}: format {line}");
        }
    }
}

/// Walks every schema below `node` and calls `see` with its path.
fn walk(node: &Value, path: &str, see: &mut dyn FnMut(&str, &Value)) {
    see(path, node);
    for (name, child) in node["properties"].as_object().into_iter().flatten() {
        walk(child, &format!("{path}.{name}"), see);
    }
    if node["items"].is_object() {
        walk(&node["items"], &format!("{path}[]"), see);
    }
}

fn schemas() -> Vec<(String, Value)> {
    crds()
        .into_iter()
        .map(|crd| {
            let version = serde_json::to_value(&crd.spec.versions[0]).expect("a version is plain data");
            (crd.spec.names.kind, version["schema"]["openAPIV3Schema"].clone())
        })
        .collect()
}

#[test]
fn every_field_has_a_text_for_kubectl_explain() {
    for (kind, schema) in schemas() {
        walk(&schema, &kind, &mut |path, node| {
            if !path.ends_with("[]") {
                assert!(
                    node["description"].as_str().is_some_and(|text| !text.is_empty()),
                    "{path} has no description"
                );
            }
        });
    }
}

#[test]
fn every_list_and_text_of_the_spec_is_bounded_so_that_rules_have_a_cost() {
    let (_, agent) = schemas().remove(0);
    walk(
        &agent["properties"]["spec"],
        "spec",
        &mut |path, node| match node["type"].as_str() {
            Some("array") => assert!(node["maxItems"].is_u64(), "{path} has no maxItems"),
            Some("string") => assert!(
                node["maxLength"].is_u64() || node["enum"].is_array(),
                "{path} has no maxLength"
            ),
            Some("object") => assert!(
                node["properties"].is_object() || node["maxProperties"].is_u64(),
                "{path} has no maxProperties"
            ),
            Some(_) | None => {}
        },
    );
}

#[test]
fn defaults_are_the_promised_ones_and_nothing_else_has_a_default() {
    let (_, agent) = schemas().remove(0);
    let mut defaults = Vec::new();
    walk(&agent["properties"]["spec"], "spec", &mut |path, node| {
        if let Some(value) = node.get("default") {
            defaults.push(format!("{path}={value}"));
        }
    });
    defaults.sort();
    assert_eq!(
        defaults,
        [
            "spec.cpu=1",
            "spec.lostPolicy=\"Fail\"",
            "spec.memory=\"512Mi\"",
            "spec.network.egress[].ports[].protocol=\"TCP\"",
            "spec.network.mode=\"Restricted\"",
            "spec.operatingMode=\"Running\"",
            "spec.restartPolicy=\"Never\"",
            "spec.startPolicy=\"Immediate\"",
            "spec.terminationGracePeriodSeconds=10"
        ]
    );
    assert_eq!(agent["properties"]["spec"]["required"], serde_json::json!(["image"]));
}

#[test]
fn a_quantity_is_never_null() {
    let (_, agent) = schemas().remove(0);
    for field in ["memory", "cpu"] {
        assert_eq!(
            agent["properties"]["spec"]["properties"][field]["nullable"],
            Value::Null,
            "spec.{field}"
        );
    }
}

#[test]
fn names_columns_and_selectable_fields_are_those_of_the_contract() {
    let crd = serde_json::to_value(&crds()[0]).unwrap();
    assert_eq!(crd["spec"]["names"]["shortNames"], serde_json::json!(["fa"]));
    assert_eq!(crd["spec"]["names"]["categories"], serde_json::json!(["tiffany"]));
    let version = &crd["spec"]["versions"][0];
    assert_eq!(version["name"], "v1");
    assert_eq!(version["subresources"]["status"], serde_json::json!({}));
    let columns: Vec<_> = version["additionalPrinterColumns"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| one["name"].as_str().unwrap())
        .collect();
    assert_eq!(
        columns,
        [
            "Phase", "Blade", "Exit", "Restarts", "Age", "Image", "Reason", "Pool", "Attempt"
        ]
    );
    assert_eq!(version["selectableFields"].as_array().unwrap().len(), 3);
}

#[test]
fn the_seeds_yaml_is_read_character_for_character() {
    let path = folder().join("../../examples/embedder.yaml");
    let text = fs::read_to_string(path).unwrap();
    let agent: FarAgent = serde_saphyr::from_str(&text).unwrap();
    assert_eq!(agent.metadata.name.as_deref(), Some("embedder-worker-01"));
    assert_eq!(agent.spec.image, "ghcr.io/microscaler/tiffany-vm:v0.3.1");
    assert_eq!(
        (agent.spec.memory.to_string(), agent.spec.cpu.to_string()),
        ("512Mi".into(), "1".into())
    );
    assert_eq!(agent.spec.entrypoint.as_deref(), Some("/usr/local/bin/tiffany"));
    assert_eq!(agent.spec.args.unwrap(), ["--task", "embedder"]);
}
