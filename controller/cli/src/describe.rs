//! `far describe`: one object with its fields spelled out, and its events.

use anyhow::Context;
use serde_json::Value;

use crate::{
    args::DescribeArgs,
    cluster::{Cluster, escaped},
    exit::Outcome,
    folders::Folders,
    get::parse_wanted,
    kinds,
    logs::Boot,
    net, output,
    table::{aligned, printable},
};

/// Events shown at most; the newest.
const MAX_EVENTS: usize = 50;
/// Longest line of a text that has several, in characters.
const MAX_LINE: usize = 160;

pub(crate) async fn describe(cluster: &Cluster, folders: &Folders, args: &DescribeArgs) -> anyhow::Result<Outcome> {
    // A lone name is a FarAgent, which is what most people look at.
    let words = match args.what.as_slice() {
        [name] if !name.contains('/') => vec!["faragent".to_owned(), name.clone()],
        words => words.to_vec(),
    };
    let wanted = parse_wanted(&words)?;
    let api = cluster.connect().await?;
    for one in wanted {
        let kind = kinds::find(&api, &one.kind).await?;
        let name = one.name.unwrap_or_default();
        let object: Value = api
            .get(&kind.path(&api.namespace, &name))
            .await
            .with_context(|| format!("getting {name}"))?;
        for line in lines(&object) {
            output::line(&line);
        }
        // Counted by the blade, so only where it is this machine's.
        if object["kind"] == "FarAgent"
            && let Some(boot) = Boot::of(&object)
        {
            let network = net::of_agent(folders, boot.identity).await;
            network.into_iter().flatten().for_each(|line| output::line(&line));
        }
        let uid = object["metadata"]["uid"].as_str().unwrap_or_default();
        // Events of cluster scoped objects are in the default namespace.
        let namespace = object["metadata"]["namespace"].as_str().unwrap_or("default");
        let selector = escaped(&format!("involvedObject.uid={uid}"));
        let events: Value = api
            .get(&format!(
                "/api/v1/namespaces/{}/events?fieldSelector={selector}",
                escaped(namespace)
            ))
            .await
            .context("listing its events")?;
        for line in event_lines(&events, time::OffsetDateTime::now_utc()) {
            output::line(&line);
        }
    }
    Ok(Outcome::Success)
}

/// Name, labels and annotations first; then every other field, as an indented tree.
fn lines(object: &Value) -> Vec<String> {
    let metadata = &object["metadata"];
    let mut rows = vec![
        ("Name:", text(&metadata["name"])),
        ("Namespace:", text(&metadata["namespace"])),
    ];
    for (title, field) in [("Labels:", "labels"), ("Annotations:", "annotations")] {
        let pairs: Vec<_> = metadata[field]
            .as_object()
            .into_iter()
            .flatten()
            .map(|(key, value)| format!("{key}={}", text(value)))
            .collect();
        rows.push((
            title,
            if pairs.is_empty() {
                "<none>".into()
            } else {
                pairs.join(", ")
            },
        ));
    }
    rows.push(("API Version:", text(&object["apiVersion"])));
    rows.push(("Kind:", text(&object["kind"])));
    rows.push(("Created:", text(&metadata["creationTimestamp"])));
    if !metadata["deletionTimestamp"].is_null() {
        rows.push(("Deleted:", text(&metadata["deletionTimestamp"])));
    }
    rows.push(("Generation:", text(&metadata["generation"])));
    rows.push(("UID:", text(&metadata["uid"])));
    let rows: Vec<Vec<String>> = rows
        .into_iter()
        .map(|(title, value)| vec![title.to_owned(), value])
        .collect();
    let mut lines = aligned(&rows);
    let is_secret = object["kind"] == "Secret" && object["apiVersion"] == "v1";
    for (key, value) in object.as_object().into_iter().flatten() {
        if matches!(key.as_str(), "metadata" | "apiVersion" | "kind") {
            continue;
        }
        if is_secret && matches!(key.as_str(), "data" | "stringData") {
            lines.push(format!("{}:", title(key)));
            for (name, value) in value.as_object().into_iter().flatten() {
                lines.push(format!("  {name}: {} characters", value.as_str().map_or(0, str::len)));
            }
            continue;
        }
        // Field names are titled; the keys of a ConfigMap's data are the user's own words.
        let naming: fn(&str) -> String = if matches!(key.as_str(), "spec" | "status") {
            title
        } else {
            printable
        };
        match value {
            Value::Object(map) if !map.is_empty() => {
                lines.push(format!("{}:", title(key)));
                for (key, value) in map {
                    tree(naming, key, value, 1, &mut lines);
                }
            }
            other => tree(title, key, other, 0, &mut lines),
        }
    }
    lines
}

/// One field: `Exit Code:  3`, or its title with its parts below it.
fn tree(naming: fn(&str) -> String, key: &str, value: &Value, depth: usize, lines: &mut Vec<String>) {
    let indent = "  ".repeat(depth);
    let title = naming(key);
    match value {
        Value::Object(map) if !map.is_empty() => {
            lines.push(format!("{indent}{title}:"));
            for (key, value) in map {
                tree(naming, key, value, depth + 1, lines);
            }
        }
        Value::Array(items) if items.iter().any(|item| item.is_object() || item.is_array()) => {
            lines.push(format!("{indent}{title}:"));
            for (index, item) in items.iter().enumerate() {
                if index > 0 {
                    lines.push(format!("{indent}  --"));
                }
                match item {
                    Value::Object(map) => {
                        for (key, value) in map {
                            tree(naming, key, value, depth + 1, lines);
                        }
                    }
                    other => lines.push(format!("{indent}  {}", text(other))),
                }
            }
        }
        Value::Array(items) if !items.is_empty() => {
            lines.push(format!("{indent}{title}:"));
            for item in items {
                lines.push(format!("{indent}  {}", text(item)));
            }
        }
        Value::String(long) if long.trim_end().contains('\n') => {
            lines.push(format!("{indent}{title}:"));
            for line in long.lines() {
                lines.push(format!("{indent}  {}", cut(&printable(line))));
            }
        }
        other => lines.push(format!("{indent}{title}:  {}", text(other))),
    }
}

/// A line of an agent's output, at most as long as a wide terminal: `far logs` has it whole.
fn cut(line: &str) -> String {
    match line.char_indices().nth(MAX_LINE) {
        Some((end, _)) => format!("{} …", &line[..end]),
        None => line.to_owned(),
    }
}

/// `exitCode` as `Exit Code`, `imageDigest` as `Image Digest`. Keys that are no field names (labels, file names) stay.
fn title(key: &str) -> String {
    if !key.chars().all(|c| c.is_ascii_alphanumeric()) {
        return printable(key);
    }
    let mut title = String::new();
    let mut before = ' ';
    for c in key.chars() {
        if title.is_empty() {
            title.extend(c.to_uppercase());
        } else {
            if c.is_ascii_uppercase() && before.is_ascii_lowercase() {
                title.push(' ');
            }
            title.push(c);
        }
        before = c;
    }
    // A unit, not two words.
    title.replace("Mi B", "MiB")
}

fn text(value: &Value) -> String {
    match value {
        Value::Null => "<none>".to_owned(),
        Value::String(text) => printable(text.trim_end_matches('\n')),
        Value::Array(items) if items.is_empty() => "<none>".to_owned(),
        Value::Object(map) if map.is_empty() => "<none>".to_owned(),
        other => other.to_string(),
    }
}

fn event_lines(list: &Value, now: time::OffsetDateTime) -> Vec<String> {
    let mut events: Vec<_> = list["items"].as_array().into_iter().flatten().collect();
    if events.is_empty() {
        return vec!["Events:  <none>".to_owned()];
    }
    events.sort_by_key(|event| event_time(event));
    let newest = events.split_off(events.len().saturating_sub(MAX_EVENTS));
    let mut rows = vec![
        ["  Type", "Reason", "Age", "From", "Message"]
            .map(str::to_owned)
            .to_vec(),
        ["  ----", "------", "---", "----", "-------"]
            .map(str::to_owned)
            .to_vec(),
    ];
    for event in newest {
        let from = [
            &event["source"]["component"],
            &event["reportingComponent"],
            &event["reportingController"],
        ]
        .into_iter()
        .find_map(|value| value.as_str().filter(|text| !text.is_empty()))
        .unwrap_or_default();
        let count = event["count"].as_i64().or_else(|| event["series"]["count"].as_i64());
        let mut age = event_time(event).map_or_else(|| "<unknown>".to_owned(), |seen| span(now - seen));
        if let Some(count) = count.filter(|count| *count > 1) {
            age.push_str(&format!(" (x{count})"));
        }
        rows.push(vec![
            format!("  {}", text(&event["type"])),
            text(&event["reason"]),
            age,
            printable(from),
            text(&event["message"]),
        ]);
    }
    let mut lines = vec!["Events:".to_owned()];
    lines.extend(aligned(&rows));
    lines
}

/// When it was seen last, by any of the fields that the two event APIs use.
fn event_time(event: &Value) -> Option<time::OffsetDateTime> {
    [
        &event["series"]["lastObservedTime"],
        &event["lastTimestamp"],
        &event["eventTime"],
        &event["metadata"]["creationTimestamp"],
    ]
    .into_iter()
    .find_map(|value| time::OffsetDateTime::parse(value.as_str()?, &time::format_description::well_known::Rfc3339).ok())
}

/// A time span as kubectl writes ages: 45s, 12m, 3h, 2d.
pub(crate) fn span(age: time::Duration) -> String {
    let seconds = age.whole_seconds().max(0);
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn fields_are_titled_and_indented() {
        let object = json!({
            "apiVersion": "tiffany.dev/v1", "kind": "FarAgent",
            "metadata": {"name": "a", "namespace": "n", "labels": {"x.io/y": "z"}, "uid": "u"},
            "spec": {"args": ["--task", "embedder"], "files": [{"path": "/a"}, {"path": "/b"}], "env": []},
            "status": {"exitCode": 3, "memoryMiB": 8, "tail": format!("one\n{}\n", "x".repeat(300)), "imageDigest": "sha256:0"}
        });
        let text = lines(&object).join("\n");
        for expected in [
            "Labels:        x.io/y=z",
            "Spec:\n  Args:\n    --task\n    embedder",
            "  Env:  <none>",
            "  Files:\n    Path:  /a\n    --\n    Path:  /b",
            "Status:\n  Exit Code:  3\n  Image Digest:  sha256:0\n  Memory MiB:  8\n  Tail:\n    one\n    xxx",
        ] {
            assert!(text.contains(expected), "{expected:?} is not in\n{text}");
        }
        assert!(
            text.lines().all(|line| line.chars().count() < 170),
            "long lines of output are cut"
        );
    }

    #[test]
    fn a_secrets_values_are_not_shown() {
        let object =
            json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}, "data": {"key": "aHVudGVyMg=="}});
        let text = lines(&object).join("\n");
        assert!(
            text.contains("key: 12 characters") && !text.contains("aHVudGVyMg"),
            "{text}"
        );
    }

    #[test]
    fn output_of_an_agent_cannot_move_the_terminal() {
        let object = json!({"status": {"tail": "a\u{1b}[2Jb\nc"}});
        assert!(!lines(&object).join("\n").contains('\u{1b}'));
    }

    #[test]
    fn events_are_in_order_with_their_age() {
        let now = time::OffsetDateTime::parse("2026-01-01T00:10:00Z", &time::format_description::well_known::Rfc3339)
            .unwrap();
        let list = json!({"items": [
            {"type": "Normal", "reason": "Started", "message": "b", "eventTime": "2026-01-01T00:09:50.123456Z", "reportingController": "far-controller"},
            {"type": "Normal", "reason": "Scheduled", "message": "a", "lastTimestamp": "2026-01-01T00:05:00Z", "count": 3, "source": {"component": "far-controller"}},
        ]});
        let lines = event_lines(&list, now);
        assert_eq!(lines.len(), 5);
        assert!(
            lines[3].contains("Scheduled") && lines[3].contains("5m (x3)"),
            "{lines:?}"
        );
        assert!(lines[4].contains("Started") && lines[4].contains("9s"), "{lines:?}");
        assert_eq!(event_lines(&json!({"items": []}), now), ["Events:  <none>"]);
    }
}
