//! Label and field selectors.

use serde_json::Value;

use crate::error::ApiError;
use crate::jsonpath;

#[derive(Debug, Clone, PartialEq)]
enum Rule {
    In(Vec<String>),
    NotIn(Vec<String>),
    Exists,
    Missing,
    Greater(i64),
    Less(i64),
}

/// What a list or watch is narrowed to.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Selector {
    labels: Vec<(String, Rule)>,
    /// (JSONPath, wanted text, equal)
    fields: Vec<(String, String, bool)>,
}

impl Selector {
    /// `selectable`: JSONPaths the kind allows besides name and namespace.
    pub(crate) fn parse(labels: Option<&str>, fields: Option<&str>, selectable: &[String]) -> Result<Self, ApiError> {
        Ok(Self {
            labels: parse_labels(labels.unwrap_or_default())?,
            fields: parse_fields(fields.unwrap_or_default(), selectable)?,
        })
    }

    pub(crate) fn require_name(&mut self, name: &str) {
        self.fields.push((".metadata.name".to_owned(), name.to_owned(), true));
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.labels.is_empty() && self.fields.is_empty()
    }

    pub(crate) fn matches(&self, object: &Value) -> bool {
        let labels = &object["metadata"]["labels"];
        let label_fits = |(key, rule): &(String, Rule)| fits(rule, labels[key].as_str());
        let field_fits = |(path, wanted, equal): &(String, String, bool)| {
            let found = jsonpath::find(object, path).first().map(|value| match value {
                Value::String(text) => text.clone(),
                Value::Null => String::new(),
                other => other.to_string(),
            });
            (found.unwrap_or_default() == *wanted) == *equal
        };
        self.labels.iter().all(label_fits) && self.fields.iter().all(field_fits)
    }
}

fn fits(rule: &Rule, found: Option<&str>) -> bool {
    match rule {
        Rule::In(values) => found.is_some_and(|found| values.iter().any(|value| value == found)),
        Rule::NotIn(values) => found.is_none_or(|found| values.iter().all(|value| value != found)),
        Rule::Exists => found.is_some(),
        Rule::Missing => found.is_none(),
        Rule::Greater(limit) => found.and_then(|v| v.parse::<i64>().ok()).is_some_and(|v| v > *limit),
        Rule::Less(limit) => found.and_then(|v| v.parse::<i64>().ok()).is_some_and(|v| v < *limit),
    }
}

/// Splits at commas outside parentheses.
fn requirements(text: &str) -> Vec<&str> {
    let (mut depth, mut start, mut parts) = (0, 0, Vec::new());
    for (at, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(text[start..at].trim());
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(text[start..].trim());
    parts.retain(|part| !part.is_empty());
    parts
}

fn parse_labels(text: &str) -> Result<Vec<(String, Rule)>, ApiError> {
    requirements(text)
        .into_iter()
        .map(|part| parse_label(part).ok_or_else(|| bad(text, part)))
        .collect()
}

fn bad(text: &str, part: &str) -> ApiError {
    ApiError::BadRequest(format!("unable to parse requirement: {part:?} in selector {text:?}"))
}

fn parse_label(part: &str) -> Option<(String, Rule)> {
    let set = |values: &str| -> Option<Vec<String>> {
        let inner = values.trim().strip_prefix('(')?.strip_suffix(')')?;
        Some(inner.split(',').map(|value| value.trim().to_owned()).collect())
    };
    let (key, rule) = if let Some((key, values)) = part.split_once(" notin ").or_else(|| split_set(part, " notin(")) {
        (key, Rule::NotIn(set(values)?))
    } else if let Some((key, values)) = part.split_once(" in ").or_else(|| split_set(part, " in(")) {
        (key, Rule::In(set(values)?))
    } else if let Some((key, value)) = part.split_once("!=") {
        (key, Rule::NotIn(vec![value.trim().to_owned()]))
    } else if let Some((key, value)) = part.split_once("==").or_else(|| part.split_once('=')) {
        (key, Rule::In(vec![value.trim().to_owned()]))
    } else if let Some((key, value)) = part.split_once('>') {
        (key, Rule::Greater(value.trim().parse().ok()?))
    } else if let Some((key, value)) = part.split_once('<') {
        (key, Rule::Less(value.trim().parse().ok()?))
    } else if let Some(key) = part.strip_prefix('!') {
        (key, Rule::Missing)
    } else {
        (part, Rule::Exists)
    };
    let key = key.trim();
    let valid = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
    (!key.is_empty() && key.chars().all(valid)).then(|| (key.to_owned(), rule))
}

/// `key in(a,b)` without the space before the parenthesis.
fn split_set<'a>(part: &'a str, word: &str) -> Option<(&'a str, &'a str)> {
    let at = part.find(word)?;
    Some((&part[..at], &part[at + word.len() - 1..]))
}

fn parse_fields(text: &str, selectable: &[String]) -> Result<Vec<(String, String, bool)>, ApiError> {
    let mut parsed = Vec::new();
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let (key, value, equal) = if let Some((key, value)) = part.split_once("!=") {
            (key, value, false)
        } else if let Some((key, value)) = part.split_once("==").or_else(|| part.split_once('=')) {
            (key, value, true)
        } else {
            return Err(ApiError::BadRequest(format!("invalid field selector: {part:?}")));
        };
        let path = format!(".{}", key.trim().trim_start_matches('.'));
        let known = matches!(path.as_str(), ".metadata.name" | ".metadata.namespace") || selectable.contains(&path);
        if !known {
            return Err(ApiError::BadRequest(format!(
                "field label not supported: {}",
                key.trim()
            )));
        }
        parsed.push((path, value.trim().to_owned(), equal));
    }
    Ok(parsed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn label_selectors_follow_the_grammar() {
        let object = json!({"metadata": {"labels": {"app": "a", "n": "5"}}});
        let cases = [
            ("app=a", true),
            ("app==b", false),
            ("app!=b", true),
            ("x!=b", true),
            ("app in (a, b)", true),
            ("app in(c)", false),
            ("app notin (a)", false),
            ("x notin (a)", true),
            ("app", true),
            ("!app", false),
            ("!x", true),
            ("n>4", true),
            ("n<4", false),
            ("app=a,n=5", true),
            ("app in (a,b),!x,n", true),
            ("", true),
        ];
        for (text, expected) in cases {
            assert_eq!(
                Selector::parse(Some(text), None, &[]).unwrap().matches(&object),
                expected,
                "{text}"
            );
        }
        assert!(Selector::parse(Some("a b c"), None, &[]).is_err());
    }

    #[test]
    fn only_declared_fields_can_be_selected() {
        let object = json!({"metadata": {"name": "a"}, "spec": {"nodeName": "blade-1"}});
        let selectable = [".spec.nodeName".to_owned()];
        let fits = |text: &str| Selector::parse(None, Some(text), &selectable).map(|s| s.matches(&object));
        assert_eq!(fits("metadata.name=a,spec.nodeName=blade-1"), Ok(true));
        assert_eq!(fits("spec.nodeName!=blade-1"), Ok(false));
        assert_eq!(
            fits("spec.image=x"),
            Err(ApiError::BadRequest("field label not supported: spec.image".into()))
        );
    }
}
