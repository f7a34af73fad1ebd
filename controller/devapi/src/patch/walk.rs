//! Values seen through their schema for server-side apply: which fields a value sets, how two values differ, how one
//! is laid over another, and how fields are taken away.

use serde_json::{Map, Value};

use super::fieldset::FieldSet;
use crate::schema::field;

/// How a value is merged.
enum Shape<'a> {
    /// Field by field.
    Granular(&'a Map<String, Value>),
    /// Items identified by these keys.
    Keyed(&'a [Value], Vec<String>),
    Set(&'a [Value]),
    /// As a whole: scalars, atomic lists and maps.
    Atomic,
}

fn shape<'a>(schema: Option<&Value>, value: &'a Value) -> Shape<'a> {
    let tag = |name: &str| schema.and_then(|schema| schema[name].as_str()).unwrap_or_default();
    match value {
        Value::Object(_) if tag("x-kubernetes-map-type") == "atomic" => Shape::Atomic,
        Value::Object(map) => Shape::Granular(map),
        Value::Array(items) => match tag("x-kubernetes-list-type") {
            "map" => {
                let keys = schema.and_then(|schema| schema["x-kubernetes-list-map-keys"].as_array());
                Shape::Keyed(
                    items,
                    keys.into_iter()
                        .flatten()
                        .filter_map(Value::as_str)
                        .map(str::to_owned)
                        .collect(),
                )
            }
            "set" => Shape::Set(items),
            _ => Shape::Atomic,
        },
        _ => Shape::Atomic,
    }
}

/// Schema's defaults count as keys when an item leaves one out.
fn key_of(item: &Value, keys: &[String], items: Option<&Value>) -> String {
    let pairs = keys.iter().map(|key| {
        let given = &item[key];
        let default = || {
            items
                .and_then(|schema| field(schema, key))
                .map(|schema| schema["default"].clone())
        };
        (
            key.clone(),
            if given.is_null() {
                default().unwrap_or(Value::Null)
            } else {
                given.clone()
            },
        )
    });
    format!("k:{}", Value::Object(pairs.collect()))
}

fn is_property(schema: Option<&Value>, name: &str) -> bool {
    schema
        .and_then(|schema| schema.get("properties"))
        .is_some_and(|properties| properties.get(name).is_some())
}

fn child<'a>(schema: Option<&'a Value>, name: &str) -> Option<&'a Value> {
    schema.and_then(|schema| field(schema, name))
}

fn items(schema: Option<&Value>) -> Option<&Value> {
    schema.and_then(|schema| schema.get("items"))
}

/// The fields a value sets.
pub(crate) fn fields(schema: Option<&Value>, value: &Value) -> FieldSet {
    let mut set = FieldSet::default();
    match shape(schema, value) {
        Shape::Granular(map) if !map.is_empty() => {
            for (name, inner) in map {
                let mut below = fields(child(schema, name), inner);
                below.member |= !is_property(schema, name);
                set.children.insert(format!("f:{name}"), below);
            }
        }
        Shape::Keyed(list, keys) if !list.is_empty() => {
            for item in list {
                let mut below = fields(items(schema), item);
                below.member = true;
                set.children.insert(key_of(item, &keys, items(schema)), below);
            }
        }
        Shape::Set(list) if !list.is_empty() => {
            for item in list {
                set.children.insert(format!("v:{item}"), FieldSet::leaf());
            }
        }
        Shape::Granular(_) | Shape::Keyed(..) | Shape::Set(_) | Shape::Atomic => set.member = true,
    }
    set
}

#[derive(Debug, Default)]
pub(crate) struct Differences {
    /// Added or modified.
    pub changed: FieldSet,
    pub removed: FieldSet,
}

pub(crate) fn compare(schema: Option<&Value>, old: Option<&Value>, new: Option<&Value>) -> Differences {
    let mut result = Differences::default();
    match (old, new) {
        (None, None) => {}
        (None, Some(new)) => result.changed = whole(schema, new),
        (Some(old), None) => result.removed = whole(schema, old),
        (Some(old), Some(new)) if old == new => {}
        (Some(old), Some(new)) => match (shape(schema, old), shape(schema, new)) {
            (Shape::Granular(before), Shape::Granular(after)) => {
                let names = before
                    .keys()
                    .chain(after.keys().filter(|name| !before.contains_key(*name)));
                for name in names {
                    let below = compare(child(schema, name), before.get(name), after.get(name));
                    put(&mut result, format!("f:{name}"), below);
                }
            }
            (Shape::Keyed(before, keys), Shape::Keyed(after, _)) => {
                let key = |item: &&Value| key_of(item, &keys, items(schema));
                for item in before.iter().chain(after) {
                    let id = key(&item);
                    let find = |list: &'_ [Value]| list.iter().position(|have| key(&have) == id);
                    let (was, is) = (find(before).map(|at| &before[at]), find(after).map(|at| &after[at]));
                    put(&mut result, id, compare(items(schema), was, is));
                }
            }
            (Shape::Set(before), Shape::Set(after)) => {
                for item in after.iter().filter(|item| !before.contains(item)) {
                    result.changed.children.insert(format!("v:{item}"), FieldSet::leaf());
                }
                for item in before.iter().filter(|item| !after.contains(item)) {
                    result.removed.children.insert(format!("v:{item}"), FieldSet::leaf());
                }
            }
            _ => {
                result.changed.member = true;
                result.removed = whole(schema, old);
                result.removed.member = false;
            }
        },
    }
    result
}

fn put(result: &mut Differences, element: String, below: Differences) {
    if !below.changed.is_empty() {
        result.changed.children.insert(element.clone(), below.changed);
    }
    if !below.removed.is_empty() {
        result.removed.children.insert(element, below.removed);
    }
}

/// Every path of a value, containers too: it came or went as a whole.
fn whole(schema: Option<&Value>, value: &Value) -> FieldSet {
    fn own_all(set: &mut FieldSet) {
        set.member = true;
        set.children.values_mut().for_each(own_all);
    }
    let mut set = fields(schema, value);
    own_all(&mut set);
    set
}

/// `config` laid over `live`.
pub(crate) fn merge(schema: Option<&Value>, live: &Value, config: &Value) -> Value {
    match (shape(schema, live), shape(schema, config)) {
        (Shape::Granular(before), Shape::Granular(over)) => {
            let mut merged = before.clone();
            for (name, value) in over {
                let value = before
                    .get(name)
                    .map_or_else(|| value.clone(), |have| merge(child(schema, name), have, value));
                merged.insert(name.clone(), value);
            }
            Value::Object(merged)
        }
        (Shape::Keyed(before, keys), Shape::Keyed(over, _)) => {
            let mut merged = before.to_vec();
            for item in over {
                let id = key_of(item, &keys, items(schema));
                match merged.iter().position(|have| key_of(have, &keys, items(schema)) == id) {
                    Some(at) => merged[at] = merge(items(schema), &merged[at], item),
                    None => merged.push(item.clone()),
                }
            }
            Value::Array(merged)
        }
        (Shape::Set(before), Shape::Set(over)) => {
            let new = over.iter().filter(|item| !before.contains(item));
            Value::Array(before.iter().chain(new).cloned().collect())
        }
        _ => config.clone(),
    }
}

/// Takes the members of `gone` out of `value`, except where `keep` has something at or below them.
pub(crate) fn remove(schema: Option<&Value>, value: &mut Value, gone: &FieldSet, keep: &FieldSet) {
    let nothing = FieldSet::default();
    let mut dropped = Vec::new();
    for (element, below) in &gone.children {
        let kept = keep.children.get(element);
        // A container whose fields were all given up goes with them.
        let goes = below.member && kept.is_none();
        if goes {
            dropped.push(element.as_str());
        } else if let Some((inner, inner_schema)) = at_mut(schema, value, element) {
            remove(inner_schema, inner, below, kept.unwrap_or(&nothing));
        }
    }
    for element in dropped {
        drop_at(schema, value, element);
    }
}

fn list_keys(schema: Option<&Value>) -> Vec<String> {
    let keys = schema.and_then(|schema| schema["x-kubernetes-list-map-keys"].as_array());
    keys.into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .map(str::to_owned)
        .collect()
}

fn at_mut<'v, 's>(
    schema: Option<&'s Value>,
    value: &'v mut Value,
    element: &str,
) -> Option<(&'v mut Value, Option<&'s Value>)> {
    match value {
        Value::Object(map) => {
            let name = element.strip_prefix("f:")?;
            Some((map.get_mut(name)?, child(schema, name)))
        }
        Value::Array(list) => {
            let keys = list_keys(schema);
            let item = list
                .iter_mut()
                .find(|item| key_of(item, &keys, items(schema)) == element)?;
            Some((item, items(schema)))
        }
        _ => None,
    }
}

fn drop_at(schema: Option<&Value>, value: &mut Value, element: &str) {
    match value {
        Value::Object(map) => {
            if let Some(name) = element.strip_prefix("f:") {
                map.remove(name);
            }
        }
        Value::Array(list) => {
            let keys = list_keys(schema);
            list.retain(|item| match element.strip_prefix("v:") {
                Some(gone) => serde_json::from_str(gone).map_or(true, |gone: Value| gone != *item),
                None => key_of(item, &keys, items(schema)) != element,
            });
        }
        _ => {}
    }
}

/// Marks containers on the way to members as members: so they go when all their fields go.
pub(crate) fn with_containers(set: &FieldSet) -> FieldSet {
    let children = set.children.iter().map(|(element, below)| {
        let mut below = with_containers(below);
        below.member |= element.starts_with("f:") && !below.children.is_empty();
        (element.clone(), below)
    });
    FieldSet {
        member: set.member,
        children: children.collect(),
    }
}
