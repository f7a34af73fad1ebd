//! The part of JSONPath that printer columns, scale and selectable fields use: fields, quoted fields, indices,
//! wildcards and `[?(@.a=="b")]` filters.

use serde_json::Value;

#[derive(Debug, PartialEq)]
enum Step {
    Field(String),
    Index(i64),
    All,
    /// Items whose field equals the text.
    Where(Vec<String>, String),
}

/// All values the path reaches; nothing when it does not parse.
pub(crate) fn find<'a>(value: &'a Value, path: &str) -> Vec<&'a Value> {
    let Some(steps) = parse(path) else { return Vec::new() };
    let mut found = vec![value];
    for step in &steps {
        found = found.into_iter().flat_map(|value| take(value, step)).collect();
    }
    found
}

/// Sets a plain field path such as `.spec.replicas`; parents are made. `false` when the path is not plain.
pub(crate) fn set(value: &mut Value, path: &str, new: Value) -> bool {
    let Some(steps) = parse(path) else { return false };
    let mut at = value;
    for step in steps {
        let Step::Field(name) = step else { return false };
        if !at.is_object() {
            *at = Value::Object(serde_json::Map::new());
        }
        at = &mut at[name];
    }
    *at = new;
    true
}

fn take<'a>(value: &'a Value, step: &Step) -> Vec<&'a Value> {
    match (step, value) {
        (Step::Field(name), Value::Object(map)) => map.get(name).into_iter().collect(),
        (Step::Index(index), Value::Array(items)) => {
            let at = if *index < 0 { items.len() as i64 + index } else { *index };
            usize::try_from(at)
                .ok()
                .and_then(|at| items.get(at))
                .into_iter()
                .collect()
        }
        (Step::All, Value::Array(items)) => items.iter().collect(),
        (Step::All, Value::Object(map)) => map.values().collect(),
        (Step::Where(path, wanted), Value::Array(items)) => items
            .iter()
            .filter(|item| {
                let found = path.iter().try_fold(*item, |at, name| at.get(name));
                found.is_some_and(|value| match value.as_str() {
                    Some(text) => text == wanted,
                    None => serde_json::from_str(wanted).is_ok_and(|wanted: Value| wanted == *value),
                })
            })
            .collect(),
        _ => Vec::new(),
    }
}

fn parse(path: &str) -> Option<Vec<Step>> {
    let path = path
        .trim()
        .trim_start_matches('{')
        .trim_end_matches('}')
        .trim_start_matches('$');
    let mut steps = Vec::new();
    let mut rest = path;
    while !rest.is_empty() {
        if let Some(inner) = rest.strip_prefix('[') {
            let end = bracket_end(inner)?;
            steps.push(bracket(&inner[..end])?);
            rest = &inner[end + 1..];
            continue;
        }
        rest = rest.strip_prefix('.').unwrap_or(rest);
        let mut name = String::new();
        let mut end = rest.len();
        let mut chars = rest.char_indices();
        while let Some((at, c)) = chars.next() {
            match c {
                '\\' => name.push(chars.next()?.1),
                '.' | '[' => {
                    end = at;
                    break;
                }
                other => name.push(other),
            }
        }
        if !name.is_empty() {
            steps.push(if name == "*" { Step::All } else { Step::Field(name) });
        } else if end == 0 && !rest.starts_with('[') {
            return None;
        }
        rest = &rest[end..];
    }
    Some(steps)
}

/// Position of the closing bracket, quotes skipped.
fn bracket_end(text: &str) -> Option<usize> {
    let mut quote = None;
    for (at, c) in text.char_indices() {
        match (quote, c) {
            (None, '\'' | '"') => quote = Some(c),
            (Some(open), c) if c == open => quote = None,
            (None, ']') => return Some(at),
            _ => {}
        }
    }
    None
}

fn bracket(inner: &str) -> Option<Step> {
    let inner = inner.trim();
    if inner == "*" {
        return Some(Step::All);
    }
    if let Ok(index) = inner.parse() {
        return Some(Step::Index(index));
    }
    if let Some(condition) = inner.strip_prefix("?(").and_then(|rest| rest.strip_suffix(')')) {
        let (left, right) = condition.split_once("==")?;
        let path = left.trim().strip_prefix("@.")?.split('.').map(str::to_owned).collect();
        return Some(Step::Where(path, unquote(right).to_owned()));
    }
    Some(Step::Field(unquote(inner).to_owned()))
}

fn unquote(text: &str) -> &str {
    text.trim().trim_matches(|c| c == '\'' || c == '"')
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn paths_of_printer_columns_find_their_values() {
        let value = json!({"status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}, {"type": "X", "status": "False"}]},
            "metadata": {"annotations": {"a.b/c": "d"}}, "list": [1, 2, 3]});
        let cases = [
            (".status.phase", vec![json!("Running")]),
            (".status.conditions[?(@.type==\"Ready\")].status", vec![json!("True")]),
            (".status.conditions[*].type", vec![json!("Ready"), json!("X")]),
            (".metadata.annotations.a\\.b/c", vec![json!("d")]),
            (".metadata.annotations['a.b/c']", vec![json!("d")]),
            (".list[-1]", vec![json!(3)]),
            (".missing.deep", vec![]),
        ];
        for (path, expected) in cases {
            assert_eq!(find(&value, path), expected.iter().collect::<Vec<_>>(), "{path}");
        }
    }

    #[test]
    fn setting_makes_the_parents() {
        let mut value = json!({});
        assert!(set(&mut value, ".spec.replicas", json!(3)));
        assert_eq!(value, json!({"spec": {"replicas": 3}}));
        assert!(!set(&mut value, ".spec[0]", json!(3)));
    }
}
