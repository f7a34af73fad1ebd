//! The kinds this API is for: the project's CRDs and the examples that users copy.
#![allow(clippy::unwrap_used)] // A panic in a test is its report.

mod common;

use std::path::Path;

use common::start;
use serde_json::Value;

#[tokio::test]
async fn the_projects_crds_are_accepted_and_its_examples_apply() {
    let server = start().await;
    for crd in far_api::crds() {
        let mut crd = serde_json::to_value(crd).unwrap();
        crd["apiVersion"] = "apiextensions.k8s.io/v1".into();
        crd["kind"] = "CustomResourceDefinition".into();
        let (code, body) = server
            .post(
                "/apis/apiextensions.k8s.io/v1/customresourcedefinitions?fieldValidation=Strict",
                &crd,
            )
            .await;
        assert_eq!(code, 201, "{body}");
    }
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples");
    let mut applied = 0;
    for entry in std::fs::read_dir(examples).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "yaml") {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        for document in text.split("\n---\n") {
            let object: Value = serde_saphyr::from_str(document).unwrap();
            let name = object["metadata"]["name"].as_str().unwrap();
            let place = match object["kind"].as_str().unwrap() {
                "ConfigMap" => "/api/v1/namespaces/default/configmaps",
                "Secret" => "/api/v1/namespaces/default/secrets",
                "FarAgent" => "/apis/tiffany.dev/v1/namespaces/default/faragents",
                "FarAgentTemplate" => "/apis/tiffany.dev/v1alpha1/namespaces/default/faragenttemplates",
                "FarAgentPool" => "/apis/tiffany.dev/v1alpha1/namespaces/default/faragentpools",
                "FarQueue" => "/apis/tiffany.dev/v1alpha1/namespaces/default/farqueues",
                "FarTask" => "/apis/tiffany.dev/v1alpha1/namespaces/default/fartasks",
                other => panic!("{}: no path is known for {other}", path.display()),
            };
            // Twice: what a user applies again changes nothing.
            let url = format!("{place}/{name}?fieldManager=test&fieldValidation=Strict");
            let (code, first) = server.patch(&url, common::APPLY, &object).await;
            assert_eq!(code, 201, "{}: {first}", path.display());
            let (code, second) = server.patch(&url, common::APPLY, &object).await;
            assert_eq!((code, second), (200, first), "{}", path.display());
            applied += 1;
        }
    }
    assert!(applied > 0, "there are examples");
}
