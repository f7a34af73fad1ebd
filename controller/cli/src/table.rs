//! Aligned columns, as kubectl prints them, from what the API or this program knows.

use serde::Deserialize;
use serde_json::Value;

/// Spaces between two columns.
const GAP: usize = 3;

/// Lines of aligned columns: every column as wide as its widest cell, the last one unpadded.
pub(crate) fn aligned(rows: &[Vec<String>]) -> Vec<String> {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let mut widths = vec![0; columns];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    rows.iter()
        .map(|row| {
            let mut line = String::new();
            for (index, (cell, width)) in row.iter().zip(&widths).enumerate() {
                line.push_str(cell);
                if index + 1 < row.len() {
                    line.extend(std::iter::repeat_n(' ', width - cell.chars().count() + GAP));
                }
            }
            line.trim_end().to_owned()
        })
        .collect()
}

/// A `meta.k8s.io/v1` Table: what the API answers to `Accept: application/json;as=Table`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Table {
    #[serde(default)]
    pub(crate) column_definitions: Vec<Column>,
    #[serde(default)]
    pub(crate) rows: Vec<Row>,
}

#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Column {
    pub(crate) name: String,
    /// 0 is always shown, others only when there is room: with `-o wide`.
    #[serde(default)]
    pub(crate) priority: i32,
}

#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Row {
    pub(crate) cells: Vec<Value>,
    /// Metadata of the object, as far as the API gives it.
    #[serde(default)]
    pub(crate) object: Value,
}

impl Table {
    /// Headings in capitals, as kubectl has them.
    pub(crate) fn headings(&self, wide: bool, with_namespace: bool) -> Vec<String> {
        let shown = self
            .column_definitions
            .iter()
            .filter(|column| wide || column.priority == 0)
            .map(|column| column.name.to_uppercase());
        with_namespace
            .then(|| "NAMESPACE".to_owned())
            .into_iter()
            .chain(shown)
            .collect()
    }

    /// The cells of the rows, as text. Columns are those of `columns`: events of a watch come without definitions.
    pub(crate) fn cells(&self, columns: &[Column], wide: bool, with_namespace: bool) -> Vec<Vec<String>> {
        self.rows
            .iter()
            .map(|row| {
                let namespace = with_namespace.then(|| {
                    row.object["metadata"]["namespace"]
                        .as_str()
                        .unwrap_or_default()
                        .to_owned()
                });
                let shown = row
                    .cells
                    .iter()
                    .zip(columns)
                    .filter(|(_, column)| wide || column.priority == 0)
                    .map(|(cell, _)| text(cell));
                namespace.into_iter().chain(shown).collect()
            })
            .collect()
    }
}

/// A cell as text. Control characters of a hostile value would reach the terminal: they are shown escaped.
fn text(cell: &Value) -> String {
    let plain = match cell {
        Value::Null => "<none>".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    printable(&plain)
}

/// The text with control characters escaped, on one line.
pub(crate) fn printable(text: &str) -> String {
    if text.chars().any(char::is_control) {
        text.chars()
            .flat_map(|c| {
                if c.is_control() {
                    c.escape_default().collect::<Vec<_>>()
                } else {
                    vec![c]
                }
            })
            .collect()
    } else {
        text.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn table() -> Table {
        serde_json::from_value(json!({
            "columnDefinitions": [{"name": "Name"}, {"name": "Phase"}, {"name": "Image", "priority": 1}],
            "rows": [
                {"cells": ["a", "Running", "x"], "object": {"metadata": {"namespace": "one"}}},
                {"cells": ["longer", null, 7], "object": {}}
            ]
        }))
        .unwrap()
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = vec![
            vec!["NAME".into(), "PHASE".into()],
            vec!["a".into(), "Running".into()],
            vec!["überlang".into(), String::new()],
        ];
        assert_eq!(aligned(&rows), ["NAME       PHASE", "a          Running", "überlang"]);
    }

    #[test]
    fn wide_and_namespace_columns_are_shown_when_asked_for() {
        let table = table();
        assert_eq!(table.headings(false, false), ["NAME", "PHASE"]);
        assert_eq!(table.headings(true, true), ["NAMESPACE", "NAME", "PHASE", "IMAGE"]);
        assert_eq!(
            table.cells(&table.column_definitions, true, true),
            [vec!["one", "a", "Running", "x"], vec!["", "longer", "<none>", "7"]]
        );
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        assert_eq!(printable("a\u{1b}[31mred\n"), "a\\u{1b}[31mred\\n");
    }
}
