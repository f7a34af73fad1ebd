//! Kinds of the API, found by any of their names: `fa`, `faragents`, `FarAgent`, `faragents.tiffany.dev`.

use anyhow::{Context, bail};
use serde::Deserialize;

use crate::cluster::{Api, ClusterError, escaped};

/// The group of our own kinds: asked first, so that the usual command costs one request.
const OWN_GROUP_VERSIONS: [&str; 2] = ["tiffany.dev/v1", "tiffany.dev/v1alpha1"];

/// One kind, as discovery describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Kind {
    /// Empty for the core group.
    pub(crate) group: String,
    pub(crate) version: String,
    pub(crate) kind: String,
    pub(crate) plural: String,
    pub(crate) singular: String,
    pub(crate) short_names: Vec<String>,
    pub(crate) is_namespaced: bool,
}

impl Kind {
    /// `faragent.tiffany.dev`, `configmap`: as kubectl names a kind with an object.
    pub(crate) fn label(&self) -> String {
        if self.group.is_empty() {
            self.singular.clone()
        } else {
            format!("{}.{}", self.singular, self.group)
        }
    }

    pub(crate) fn api_version(&self) -> String {
        if self.group.is_empty() {
            self.version.clone()
        } else {
            format!("{}/{}", self.group, self.version)
        }
    }

    /// Path of the list in a namespace; in all with `None`.
    pub(crate) fn list_path(&self, namespace: Option<&str>) -> String {
        let base = base_path(&self.api_version());
        match namespace {
            Some(namespace) if self.is_namespaced => {
                format!("{base}/namespaces/{}/{}", escaped(namespace), self.plural)
            }
            _ => format!("{base}/{}", self.plural),
        }
    }

    pub(crate) fn path(&self, namespace: &str, name: &str) -> String {
        format!("{}/{}", self.list_path(Some(namespace)), escaped(name))
    }

    /// Whether a user means this kind by `word`.
    fn is_named(&self, word: &str) -> bool {
        let word = word.to_ascii_lowercase();
        let (name, rest) = word.split_once('.').unwrap_or((&word, ""));
        let fits_name = name == self.plural
            || name == self.singular
            || name == self.kind.to_ascii_lowercase()
            || self.short_names.iter().any(|short| short == name);
        let fits_group = rest.is_empty() || rest == self.group || rest == format!("{}.{}", self.version, self.group);
        fits_name && fits_group
    }
}

fn base_path(group_version: &str) -> String {
    if group_version.contains('/') {
        format!("/apis/{group_version}")
    } else {
        format!("/api/{group_version}")
    }
}

#[derive(Debug, Deserialize)]
struct ResourceList {
    resources: Vec<Resource>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Resource {
    name: String,
    #[serde(default)]
    singular_name: String,
    namespaced: bool,
    kind: String,
    #[serde(default)]
    short_names: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct GroupList {
    groups: Vec<Group>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Group {
    preferred_version: Option<GroupVersion>,
    versions: Vec<GroupVersion>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct GroupVersion {
    group_version: String,
}

/// The kinds of one group and version; none where the API has not got it.
async fn of_group_version(api: &Api, group_version: &str) -> Result<Vec<Kind>, ClusterError> {
    let list: ResourceList = match api.get(&base_path(group_version)).await {
        Ok(list) => list,
        Err(error) if error.is_not_found() => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    Ok(from_list(group_version, list))
}

fn from_list(group_version: &str, list: ResourceList) -> Vec<Kind> {
    let (group, version) = group_version.split_once('/').unwrap_or(("", group_version));
    list.resources
        .into_iter()
        // Subresources have a slash.
        .filter(|resource| !resource.name.contains('/'))
        .map(|resource| Kind {
            group: group.to_owned(),
            version: version.to_owned(),
            singular: if resource.singular_name.is_empty() {
                resource.kind.to_ascii_lowercase()
            } else {
                resource.singular_name
            },
            kind: resource.kind,
            plural: resource.name,
            short_names: resource.short_names,
            is_namespaced: resource.namespaced,
        })
        .collect()
}

/// The kind that a user calls `word`: ours first, then core, then every other group in its preferred version.
pub(crate) async fn find(api: &Api, word: &str) -> anyhow::Result<Kind> {
    let mut group_versions: Vec<String> = OWN_GROUP_VERSIONS.iter().map(ToString::to_string).collect();
    group_versions.push("v1".to_owned());
    let mut own_kinds = 0;
    for group_version in &group_versions {
        let kinds = of_group_version(api, group_version)
            .await
            .context("asking for the API's kinds")?;
        if let Some(kind) = kinds.iter().find(|kind| kind.is_named(word)) {
            return Ok(kind.clone());
        }
        if group_version != "v1" {
            own_kinds += kinds.len();
        }
    }
    let groups: GroupList = api.get("/apis").await.context("asking for the API's groups")?;
    for group in groups.groups {
        let Some(version) = group.preferred_version.or_else(|| group.versions.into_iter().next()) else {
            continue;
        };
        if group_versions.contains(&version.group_version) {
            continue;
        }
        // One broken aggregated API must not hide the others.
        let Ok(kinds) = of_group_version(api, &version.group_version).await else {
            continue;
        };
        if let Some(kind) = kinds.into_iter().find(|kind| kind.is_named(word)) {
            return Ok(kind);
        }
    }
    if own_kinds == 0 && word.to_ascii_lowercase().starts_with("fa") {
        bail!(
            "this API has no kind {word:?}: the project's CRDs are not installed in it. Install them with `far-controller crds | kubectl apply -f -`"
        );
    }
    bail!("this API has no kind {word:?}")
}

/// The kind of an object's `apiVersion` and `kind`.
pub(crate) async fn of_object(api: &Api, api_version: &str, kind: &str) -> anyhow::Result<Kind> {
    let kinds = of_group_version(api, api_version)
        .await
        .with_context(|| format!("asking for the kinds of {api_version}"))?;
    if let Some(found) = kinds.iter().find(|one| one.kind == kind) {
        return Ok(found.clone());
    }
    if kinds.is_empty() {
        bail!("apiVersion: this API has no {api_version}");
    }
    let known: Vec<_> = kinds.iter().map(|one| one.kind.as_str()).collect();
    bail!("kind: {api_version} has no {kind:?}; it has {}", known.join(", "))
}

/// The FarAgent kind without asking: its names are fixed by the CRD.
pub(crate) fn far_agent() -> Kind {
    Kind {
        group: "tiffany.dev".into(),
        version: "v1".into(),
        kind: "FarAgent".into(),
        plural: "faragents".into(),
        singular: "faragent".into(),
        short_names: vec!["fa".into()],
        is_namespaced: true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_answers_to_each_of_its_names() {
        let kind = far_agent();
        for (word, expected) in [
            ("fa", true),
            ("FarAgent", true),
            ("faragents", true),
            ("faragents.tiffany.dev", true),
            ("faragents.v1.tiffany.dev", true),
            ("faragents.v2.tiffany.dev", false),
            ("faragents.example.com", false),
            ("farnodes", false),
            ("", false),
        ] {
            assert_eq!(kind.is_named(word), expected, "{word:?}");
        }
    }

    #[test]
    fn paths_are_those_of_the_kubernetes_api() {
        let agent = far_agent();
        assert_eq!(
            agent.path("team", "a"),
            "/apis/tiffany.dev/v1/namespaces/team/faragents/a"
        );
        assert_eq!(agent.list_path(None), "/apis/tiffany.dev/v1/faragents");
        let list = serde_json::from_str(
            r#"{"resources":[{"name":"nodes","singularName":"","namespaced":false,"kind":"Node"},
                {"name":"nodes/status","singularName":"","namespaced":false,"kind":"Node"}]}"#,
        )
        .unwrap();
        let kinds = from_list("v1", list);
        assert_eq!(kinds.len(), 1, "subresources are no kinds");
        assert_eq!(kinds[0].path("team", "n"), "/api/v1/nodes/n", "cluster scoped");
        assert_eq!(kinds[0].label(), "node");
    }
}
