//! All served kinds. Readers take a snapshot; a change of a CRD puts a new one in its place.

use std::sync::{Arc, RwLock};

use serde_json::Value;

use super::resource::{Origin, Resource};
use super::{builtin, crd};

pub(crate) struct Snapshot {
    pub resources: Vec<Arc<Resource>>,
}

impl Snapshot {
    pub(crate) fn find(&self, group: &str, version: &str, plural: &str) -> Option<&Arc<Resource>> {
        self.resources
            .iter()
            .find(|r| r.group == group && r.version == version && r.plural == plural)
    }

    /// Any served version of the kind whose objects are in `storage`.
    pub(crate) fn by_storage(&self, storage: &str) -> Option<&Arc<Resource>> {
        self.resources.iter().find(|r| r.storage == storage)
    }

    /// (group, versions with the preferred one first), in the order kubectl should see them.
    pub(crate) fn groups(&self) -> Vec<(String, Vec<String>)> {
        let mut groups: Vec<(String, Vec<String>)> = Vec::new();
        for resource in &self.resources {
            match groups.iter_mut().find(|(group, _)| *group == resource.group) {
                Some((_, versions)) if versions.contains(&resource.version) => {}
                Some((_, versions)) => versions.push(resource.version.clone()),
                None => groups.push((resource.group.clone(), vec![resource.version.clone()])),
            }
        }
        for (_, versions) in &mut groups {
            versions.sort_by_key(|version| crd::version_priority(version));
        }
        groups
    }
}

pub(crate) struct Registry {
    current: RwLock<Arc<Snapshot>>,
}

impl Registry {
    pub(crate) fn new(crds: &[Value]) -> Self {
        let mut resources = builtin::resources();
        resources.extend(crds.iter().flat_map(crd::resources));
        Self {
            current: RwLock::new(Arc::new(Snapshot { resources })),
        }
    }

    pub(crate) fn snapshot(&self) -> Arc<Snapshot> {
        self.current
            .read()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .clone()
    }

    /// Replaces the kinds that come from CRDs. `stored` is read under the lock, so that of two changes at once the
    /// newer state stays.
    pub(crate) fn refresh(&self, stored: impl FnOnce() -> Vec<Value>) {
        let mut current = self.current.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        let crds = stored();
        let built_in = current
            .resources
            .iter()
            .filter(|r| r.origin == Origin::BuiltIn)
            .cloned();
        let resources = built_in.chain(crds.iter().flat_map(crd::resources)).collect();
        *current = Arc::new(Snapshot { resources });
    }
}
