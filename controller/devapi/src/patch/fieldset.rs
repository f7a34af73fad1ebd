//! Sets of fields as `managedFields` writes them (`FieldsV1`): a tree whose edges are `f:name`, `k:{keys}` or
//! `v:value`, and whose nodes say whether they are members themselves.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct FieldSet {
    /// The path that leads here is in the set.
    pub member: bool,
    pub children: BTreeMap<String, FieldSet>,
}

impl FieldSet {
    pub(crate) fn leaf() -> Self {
        Self {
            member: true,
            children: BTreeMap::new(),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        !self.member && self.children.is_empty()
    }

    pub(crate) fn parse(fields: &Value) -> Self {
        let Some(map) = fields.as_object() else {
            return Self::default();
        };
        let children: BTreeMap<_, _> = map
            .iter()
            .filter(|(name, _)| *name != ".")
            .map(|(name, child)| (name.clone(), Self::parse_child(child)))
            .collect();
        Self {
            member: map.contains_key("."),
            children,
        }
    }

    fn parse_child(fields: &Value) -> Self {
        let parsed = Self::parse(fields);
        if parsed.is_empty() { Self::leaf() } else { parsed }
    }

    pub(crate) fn to_json(&self) -> Value {
        let mut map = Map::new();
        if self.member && !self.children.is_empty() {
            map.insert(".".into(), Value::Object(Map::new()));
        }
        for (name, child) in &self.children {
            map.insert(name.clone(), child.to_json());
        }
        Value::Object(map)
    }

    pub(crate) fn union(&mut self, other: &Self) {
        self.member |= other.member;
        for (name, child) in &other.children {
            self.children.entry(name.clone()).or_default().union(child);
        }
    }

    pub(crate) fn difference(&self, other: &Self) -> Self {
        let children = self.children.iter().filter_map(|(name, child)| {
            let left = other
                .children
                .get(name)
                .map_or_else(|| child.clone(), |other| child.difference(other));
            (!left.is_empty()).then(|| (name.clone(), left))
        });
        Self {
            member: self.member && !other.member,
            children: children.collect(),
        }
    }

    pub(crate) fn intersection(&self, other: &Self) -> Self {
        let children = self.children.iter().filter_map(|(name, child)| {
            let common = child.intersection(other.children.get(name)?);
            (!common.is_empty()).then(|| (name.clone(), common))
        });
        Self {
            member: self.member && other.member,
            children: children.collect(),
        }
    }

    pub(crate) fn remove(&mut self, path: &[&str]) {
        let Some((first, rest)) = path.split_first() else {
            return;
        };
        let Some(child) = self.children.get_mut(*first) else {
            return;
        };
        if rest.is_empty() {
            self.children.remove(*first);
        } else {
            child.remove(rest);
            if child.is_empty() {
                self.children.remove(*first);
            }
        }
    }

    /// Only the named children of the root stay, or all but them.
    pub(crate) fn retain_roots(&mut self, keep: impl Fn(&str) -> bool) {
        self.children.retain(|name, _| keep(name));
    }

    /// All members as readable paths: `.spec.env[name="A"].value`.
    pub(crate) fn paths(&self) -> Vec<String> {
        let mut paths = Vec::new();
        self.collect(String::new(), &mut paths);
        paths
    }

    fn collect(&self, path: String, paths: &mut Vec<String>) {
        if self.member {
            paths.push(path.clone());
        }
        for (name, child) in &self.children {
            child.collect(format!("{path}{}", readable(name)), paths);
        }
    }
}

fn readable(element: &str) -> String {
    match element.split_once(':') {
        Some(("f", name)) => format!(".{name}"),
        Some(("k", keys)) => {
            let keys: Map<String, Value> = serde_json::from_str(keys).unwrap_or_default();
            let pairs: Vec<_> = keys.iter().map(|(key, value)| format!("{key}={value}")).collect();
            format!("[{}]", pairs.join(","))
        }
        Some(("v", value)) => format!("[={value}]"),
        _ => format!("[{element}]"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_set_survives_the_way_through_json() {
        let fields = json!({"f:metadata": {"f:labels": {".": {}, "f:a": {}}}, "f:spec": {"f:env": {"k:{\"name\":\"A\"}": {".": {}, "f:name": {}, "f:value": {}}}}});
        assert_eq!(FieldSet::parse(&fields).to_json(), fields);
        assert_eq!(
            FieldSet::parse(&fields).paths(),
            [
                ".metadata.labels",
                ".metadata.labels.a",
                ".spec.env[name=\"A\"]",
                ".spec.env[name=\"A\"].name",
                ".spec.env[name=\"A\"].value"
            ]
        );
    }

    #[test]
    fn set_algebra_works_on_members() {
        let a = FieldSet::parse(&json!({"f:x": {"f:a": {}, "f:b": {}}}));
        let b = FieldSet::parse(&json!({"f:x": {"f:b": {}, "f:c": {}}}));
        assert_eq!(a.difference(&b).to_json(), json!({"f:x": {"f:a": {}}}));
        assert_eq!(a.intersection(&b).to_json(), json!({"f:x": {"f:b": {}}}));
        let mut both = a.clone();
        both.union(&b);
        assert_eq!(both.to_json(), json!({"f:x": {"f:a": {}, "f:b": {}, "f:c": {}}}));
    }
}
