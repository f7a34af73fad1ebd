//! `metadata.managedFields`: who set what, kept for every kind of write.

use serde_json::{Value, json};

use super::fieldset::FieldSet;
use super::walk;
use crate::meta;

/// Managers by plain update kept apart; older ones are put together, as the real server does.
const MAX_UPDATERS: usize = 10;
const ANCIENT: &str = "ancient-changes";
/// One per version and subresource, at most so many.
const MAX_ANCIENT: usize = 4;

/// Fields nobody manages.
const UNMANAGED: [&[&str]; 12] = [
    &["f:apiVersion"],
    &["f:kind"],
    &["f:metadata", "f:name"],
    &["f:metadata", "f:namespace"],
    &["f:metadata", "f:uid"],
    &["f:metadata", "f:creationTimestamp"],
    &["f:metadata", "f:selfLink"],
    &["f:metadata", "f:generation"],
    &["f:metadata", "f:managedFields"],
    &["f:metadata", "f:resourceVersion"],
    &["f:metadata", "f:deletionTimestamp"],
    &["f:metadata", "f:deletionGracePeriodSeconds"],
];

/// Who writes now.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Writer {
    pub manager: String,
    pub api_version: String,
    /// Empty for the object itself.
    pub subresource: String,
    pub now: String,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Entry {
    pub manager: String,
    pub is_apply: bool,
    pub api_version: String,
    pub subresource: String,
    pub time: String,
    pub fields: FieldSet,
}

impl Entry {
    pub(crate) fn new(writer: &Writer, is_apply: bool, fields: FieldSet) -> Self {
        Self {
            manager: writer.manager.clone(),
            is_apply,
            api_version: writer.api_version.clone(),
            subresource: writer.subresource.clone(),
            time: writer.now.clone(),
            fields,
        }
    }

    /// An applier is known by name and subresource over all versions; an updater by version too.
    pub(crate) fn is(&self, writer: &Writer, is_apply: bool) -> bool {
        self.is_apply == is_apply
            && self.manager == writer.manager
            && self.subresource == writer.subresource
            && (is_apply || self.api_version == writer.api_version)
    }

    fn to_json(&self) -> Value {
        let mut entry = json!({
            "manager": self.manager, "operation": if self.is_apply { "Apply" } else { "Update" },
            "apiVersion": self.api_version, "time": self.time, "fieldsType": "FieldsV1", "fieldsV1": self.fields.to_json(),
        });
        if !self.subresource.is_empty() {
            entry["subresource"] = json!(self.subresource);
        }
        entry
    }
}

pub(crate) fn read(object: &Value) -> Vec<Entry> {
    let entries = object["metadata"]["managedFields"].as_array();
    let text = |entry: &Value, field: &str| entry[field].as_str().unwrap_or_default().to_owned();
    entries
        .into_iter()
        .flatten()
        .map(|entry| Entry {
            manager: text(entry, "manager"),
            is_apply: entry["operation"] == "Apply",
            api_version: text(entry, "apiVersion"),
            subresource: text(entry, "subresource"),
            time: text(entry, "time"),
            fields: FieldSet::parse(&entry["fieldsV1"]),
        })
        .collect()
}

pub(crate) fn write(object: &mut Value, mut entries: Vec<Entry>) {
    entries.retain(|entry| !entry.fields.is_empty());
    cap(&mut entries);
    entries.sort_by(|a, b| (!a.is_apply, &a.time, &a.manager).cmp(&(!b.is_apply, &b.time, &b.manager)));
    let entries: Vec<_> = entries.iter().map(Entry::to_json).collect();
    meta::set(
        object,
        "managedFields",
        if entries.is_empty() {
            Value::Null
        } else {
            Value::Array(entries)
        },
    );
}

fn cap(entries: &mut Vec<Entry>) {
    while entries.iter().filter(|entry| !entry.is_apply).count() > MAX_UPDATERS {
        let oldest = |entries: &[Entry]| {
            let updaters = entries
                .iter()
                .enumerate()
                .filter(|(_, e)| !e.is_apply && e.manager != ANCIENT);
            updaters.min_by(|(_, a), (_, b)| a.time.cmp(&b.time)).map(|(at, _)| at)
        };
        let Some(at) = oldest(entries) else { return };
        let gone = entries.remove(at);
        let same =
            |e: &Entry| e.manager == ANCIENT && e.subresource == gone.subresource && e.api_version == gone.api_version;
        let ancients = entries.iter().filter(|entry| entry.manager == ANCIENT).count();
        match entries.iter_mut().find(|entry| same(entry)) {
            Some(ancient) => ancient.fields.union(&gone.fields),
            None if ancients < MAX_ANCIENT => entries.push(Entry {
                manager: ANCIENT.to_owned(),
                ..gone
            }),
            // Many versions and subresources: ownership of the oldest is given up.
            None => {}
        }
    }
}

pub(crate) fn strip_unmanaged(set: &mut FieldSet) {
    for path in UNMANAGED {
        set.remove(path);
    }
    if let Some(metadata) = set.children.get_mut("f:metadata") {
        metadata.member = false;
        if metadata.is_empty() {
            set.children.remove("f:metadata");
        }
    }
    set.member = false;
}

/// Records a create, update or non-apply patch in `new`. `None` for `live` means a creation.
pub(crate) fn record_update(schema: &Value, live: Option<&Value>, new: &mut Value, writer: &Writer) {
    let sent = &new["metadata"]["managedFields"];
    let resets = sent
        .as_array()
        .is_some_and(|list| list.len() == 1 && list[0].as_object().is_some_and(serde_json::Map::is_empty));
    if resets {
        meta::set(new, "managedFields", Value::Null);
        return;
    }
    let mut entries = match (read(new), live) {
        (sent, _) if !sent.is_empty() => sent,
        (_, Some(live)) => read(live),
        (_, None) => Vec::new(),
    };
    let empty = json!({"metadata": {}});
    let mut differences = walk::compare(Some(schema), Some(live.unwrap_or(&empty)), Some(new));
    strip_unmanaged(&mut differences.changed);
    strip_unmanaged(&mut differences.removed);
    let (changed, removed) = (differences.changed, differences.removed);
    let mut own = FieldSet::default();
    let mut before = None;
    entries.retain(|entry| {
        let mine = entry.is(writer, false);
        if mine {
            before = Some(entry.clone());
        }
        !mine
    });
    for entry in &mut entries {
        entry.fields = entry.fields.difference(&changed).difference(&removed);
    }
    if let Some(before) = &before {
        own = before.fields.difference(&removed);
    }
    own.union(&changed);
    let unchanged = before.filter(|before| before.fields == own);
    entries.push(unchanged.unwrap_or_else(|| Entry::new(writer, false, own)));
    write(new, entries);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn writer(manager: &str) -> Writer {
        Writer {
            manager: manager.into(),
            api_version: "t/v1".into(),
            subresource: String::new(),
            now: "2026-01-01T00:00:00Z".into(),
        }
    }

    #[test]
    fn an_updater_takes_over_what_it_changes() {
        let schema = json!({"properties": {"metadata": {"properties": {"labels": {"additionalProperties": {"type": "string"}}}},
            "spec": {"properties": {"a": {}, "b": {}}}}});
        let mut first = json!({"metadata": {"name": "x", "labels": {"l": "1"}}, "spec": {"a": 1, "b": 1}});
        record_update(&schema, None, &mut first, &writer("one"));
        let entry = &first["metadata"]["managedFields"][0];
        assert_eq!(
            entry["fieldsV1"],
            json!({"f:metadata": {"f:labels": {".": {}, "f:l": {}}}, "f:spec": {".": {}, "f:a": {}, "f:b": {}}})
        );
        let mut second = first.clone();
        second["spec"]["a"] = json!(2);
        record_update(&schema, Some(&first), &mut second, &writer("two"));
        let owned: Vec<_> = read(&second)
            .into_iter()
            .map(|e| (e.manager, e.fields.paths()))
            .collect();
        assert_eq!(
            owned[0].1,
            [".metadata.labels", ".metadata.labels.l", ".spec", ".spec.b"]
        );
        assert_eq!(owned[1], ("two".to_owned(), vec![".spec.a".to_owned()]));
    }

    #[test]
    fn many_updaters_are_put_together() {
        let schema = json!({});
        let mut object = json!({"metadata": {"name": "x"}, "spec": {}});
        for number in 0..30 {
            let before = object.clone();
            object["spec"][format!("f{number}")] = json!(1);
            let mut by = writer(&format!("m{number}"));
            by.now = format!("2026-01-01T00:00:{number:02}Z");
            record_update(&schema, Some(&before), &mut object, &by);
        }
        assert!(read(&object).len() <= MAX_UPDATERS + 1);
        assert!(read(&object).iter().any(|entry| entry.manager == ANCIENT));
    }
}
