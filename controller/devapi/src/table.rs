//! Other forms of an answer: `Table` for kubectl's columns and `PartialObjectMetadata`.

use serde_json::{Value, json};

use crate::api::resource::{Cell, Column, Resource};
use crate::jsonpath;

/// What the `Accept` header asks for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Form {
    Object,
    Table,
    PartialMetadata,
}

impl Form {
    /// First form in the header that this server knows; a header without any known form is answered with objects.
    pub(crate) fn from_accept(accept: &str) -> Self {
        for part in accept.split(',') {
            let mut parameters = part.split(';').map(str::trim);
            let media = parameters.next().unwrap_or_default();
            if !matches!(media, "application/json" | "*/*" | "application/*") {
                continue;
            }
            let kind = parameters.find_map(|parameter| parameter.strip_prefix("as="));
            match kind {
                Some("Table") => return Self::Table,
                Some("PartialObjectMetadata" | "PartialObjectMetadataList") => return Self::PartialMetadata,
                Some(_) => {}
                None => return Self::Object,
            }
        }
        Self::Object
    }
}

/// What each row carries beside its cells (`includeObject`).
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Include {
    None,
    Metadata,
    Object,
}

impl Include {
    pub(crate) fn parse(text: Option<&str>) -> Self {
        match text {
            Some("None") => Self::None,
            Some("Object") => Self::Object,
            _ => Self::Metadata,
        }
    }
}

pub(crate) fn table(resource: &Resource, objects: &[Value], metadata: Value, include: Include, headers: bool) -> Value {
    let columns: Vec<_> = resource
        .columns
        .iter()
        .map(|c| json!({"name": c.name, "type": c.kind, "format": c.format, "description": c.description, "priority": c.priority}))
        .collect();
    let rows: Vec<_> = objects
        .iter()
        .map(|object| {
            let cells: Vec<_> = resource.columns.iter().map(|column| cell(column, object)).collect();
            let mut row = json!({"cells": cells});
            match include {
                Include::None => {}
                Include::Metadata => row["object"] = partial(object),
                Include::Object => row["object"] = object.clone(),
            }
            row
        })
        .collect();
    json!({"kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": metadata,
        "columnDefinitions": if headers { json!(columns) } else { json!([]) }, "rows": rows})
}

pub(crate) fn partial(object: &Value) -> Value {
    json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": object["metadata"]})
}

fn cell(column: &Column, object: &Value) -> Value {
    let value = match &column.cell {
        Cell::Computed(compute) => compute(object),
        Cell::Path(path) => match jsonpath::find(object, path).as_slice() {
            [] => Value::Null,
            [one] => (*one).clone(),
            // Several matches: the first, as the real server prints.
            [first, ..] => (*first).clone(),
        },
    };
    match (column.kind.as_str(), value) {
        (_, Value::Null) if column.kind == "date" => json!("<unknown>"),
        (_, Value::Null) => Value::Null,
        ("date", Value::String(stamp)) => json!(age(&stamp, time::OffsetDateTime::now_utc())),
        ("string", Value::String(text)) => Value::String(text),
        ("string", other) => Value::String(other.to_string()),
        ("integer", Value::Number(number)) => Value::Number(number),
        ("integer", Value::String(text)) => text.parse::<i64>().map_or(Value::Null, |number| json!(number)),
        ("integer", _) => Value::Null,
        (_, other) => other,
    }
}

/// Time since a stamp in kubectl's short form: `5s`, `3m12s`, `4h5m`, `2d3h`, `10d`, `2y30d`.
fn age(stamp: &str, now: time::OffsetDateTime) -> String {
    let Ok(then) = time::OffsetDateTime::parse(stamp, &time::format_description::well_known::Rfc3339) else {
        return "<invalid>".to_owned();
    };
    let seconds = (now - then).whole_seconds();
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    let pair = |big: i64, big_unit: &str, small: i64, small_unit: &str| match small {
        0 => format!("{big}{big_unit}"),
        _ => format!("{big}{big_unit}{small}{small_unit}"),
    };
    match seconds {
        i64::MIN..-1 => "<invalid>".to_owned(),
        -1..0 => "0s".to_owned(),
        0..120 => format!("{seconds}s"),
        120..600 => pair(minutes, "m", seconds % 60, "s"),
        600..10_800 => format!("{minutes}m"),
        10_800..28_800 => pair(hours, "h", minutes % 60, "m"),
        28_800..172_800 => format!("{hours}h"),
        172_800..691_200 => pair(days, "d", hours % 24, "h"),
        691_200..63_072_000 => format!("{days}d"),
        _ => pair(days / 365, "y", days % 365, "d"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_read_as_kubectl_prints_them() {
        let now = time::OffsetDateTime::from_unix_timestamp(1_000_000_000).unwrap();
        let cases = [
            (5, "5s"),
            (119, "119s"),
            (192, "3m12s"),
            (660, "11m"),
            (14_700, "4h5m"),
            (90_000, "25h"),
            (183_600, "2d3h"),
            (864_000, "10d"),
        ];
        for (seconds, text) in cases {
            let stamp = (now - time::Duration::seconds(seconds))
                .format(&time::format_description::well_known::Rfc3339)
                .unwrap();
            assert_eq!(age(&stamp, now), text);
        }
    }

    #[test]
    fn the_first_known_form_of_the_accept_header_wins() {
        let kubectl = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json;as=Table;v=v1beta1;g=meta.k8s.io,application/json";
        assert_eq!(Form::from_accept(kubectl), Form::Table);
        assert_eq!(Form::from_accept("application/json"), Form::Object);
        assert_eq!(
            Form::from_accept("application/vnd.kubernetes.protobuf,application/json"),
            Form::Object
        );
        assert_eq!(
            Form::from_accept("application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"),
            Form::PartialMetadata
        );
    }
}
