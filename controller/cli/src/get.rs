//! `far get`: the API's own tables, or whole objects; once, or with every change after.

use std::{pin::pin, time::Duration};

use anyhow::{Context, bail};
use futures::StreamExt;
use kube::core::WatchEvent;
use serde_json::{Value, json};

use crate::{
    args::{Format, GetArgs},
    cluster::{Api, Cluster, escaped},
    exit::Outcome,
    kinds::{self, Kind},
    output,
    table::{Column, Table, aligned},
};

/// Pause before a watch that the API ended is begun again.
const WATCH_AGAIN: Duration = Duration::from_millis(500);

/// What to list: a kind, and one name or all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) kind: String,
    pub(crate) name: Option<String>,
}

/// `fa`, `fa a b`, `fa,farnodes`, `fa/a fn/b`, and nothing for all FarAgents.
pub(crate) fn parse_wanted(words: &[String]) -> anyhow::Result<Vec<Wanted>> {
    let Some(first) = words.first() else {
        return Ok(vec![Wanted {
            kind: "faragents".into(),
            name: None,
        }]);
    };
    if words.iter().any(|word| word.contains('/')) {
        return words
            .iter()
            .map(|word| match word.split_once('/') {
                Some((kind, name)) if !kind.is_empty() && !name.is_empty() => Ok(Wanted {
                    kind: kind.into(),
                    name: Some(name.into()),
                }),
                _ => bail!("{word:?}: with a slash in one argument, each must be KIND/NAME"),
            })
            .collect();
    }
    let kinds: Vec<_> = first.split(',').filter(|kind| !kind.is_empty()).collect();
    if kinds.len() != 1 && words.len() > 1 {
        bail!(
            "names fit one kind only, but {first:?} names {}: use KIND/NAME",
            kinds.len()
        );
    }
    if words.len() > 1 {
        return Ok(words[1..]
            .iter()
            .map(|name| Wanted {
                kind: kinds[0].into(),
                name: Some(name.clone()),
            })
            .collect());
    }
    Ok(kinds
        .into_iter()
        .map(|kind| Wanted {
            kind: kind.into(),
            name: None,
        })
        .collect())
}

pub(crate) async fn get(cluster: &Cluster, args: &GetArgs) -> anyhow::Result<Outcome> {
    let wanted = parse_wanted(&args.what)?;
    if args.watch && wanted.len() > 1 {
        bail!("--watch follows one kind or one object; {} were named", wanted.len());
    }
    if args.all_namespaces && wanted.iter().any(|one| one.name.is_some()) {
        bail!("a name is looked for in one namespace: leave out --all-namespaces or the name");
    }
    let api = cluster.connect().await?;
    let mut view = View::new(args, wanted.iter().filter(|one| one.name.is_none()).count() != 1);
    let mut kind_of: Option<(String, Kind)> = None;
    let mut shown = 0;
    for one in &wanted {
        let kind = match &kind_of {
            Some((word, kind)) if *word == one.kind => kind.clone(),
            _ => {
                let kind = kinds::find(&api, &one.kind).await?;
                view.headings_due = true;
                kind
            }
        };
        kind_of = Some((one.kind.clone(), kind.clone()));
        let place = Place::of(&api, &kind, one, args);
        let seen = place.fetch(&api, view.is_table()).await?;
        shown += view.show(&kind, &seen)?;
        if args.watch {
            return follow(&api, &kind, &place, view, version_of(&seen)).await;
        }
    }
    view.finish()?;
    if shown == 0 && view.is_for_people() {
        match kind_of {
            Some((_, kind)) if kind.is_namespaced && !args.all_namespaces => {
                output::note(&format!("No {} in namespace {}.", kind.plural, api.namespace));
            }
            _ => output::note("Nothing found."),
        }
    }
    Ok(Outcome::Success)
}

/// Where the wanted objects are in the API.
struct Place {
    /// Path and query of the get or list.
    path: String,
    /// Path and query of the watch, to which the version is added.
    watch: String,
    name: Option<String>,
}

impl Place {
    fn of(api: &Api, kind: &Kind, wanted: &Wanted, args: &GetArgs) -> Self {
        let namespace = (!args.all_namespaces).then_some(api.namespace.as_str());
        let list = kind.list_path(namespace);
        let fields = match &wanted.name {
            Some(name) => Some(format!("metadata.name={name}")),
            None => args.field_selector.clone(),
        };
        let mut query = Vec::new();
        if let Some(labels) = &args.selector {
            query.push(format!("labelSelector={}", escaped(labels)));
        }
        if let Some(fields) = fields {
            query.push(format!("fieldSelector={}", escaped(&fields)));
        }
        let with = |first: &str| {
            let mut all: Vec<_> = (!first.is_empty()).then(|| first.to_owned()).into_iter().collect();
            all.extend(query.iter().cloned());
            if all.is_empty() {
                list.clone()
            } else {
                format!("{list}?{}", all.join("&"))
            }
        };
        Self {
            path: match &wanted.name {
                Some(name) => kind.path(&api.namespace, name),
                None => with(""),
            },
            watch: with("watch=true"),
            name: wanted.name.clone(),
        }
    }

    async fn fetch(&self, api: &Api, as_table: bool) -> anyhow::Result<Value> {
        let answer = if as_table {
            api.table(&self.path).await
        } else {
            api.get(&self.path).await
        };
        answer.with_context(|| match &self.name {
            Some(name) => format!("getting {name}"),
            None => "listing".to_owned(),
        })
    }
}

/// The version to watch from: that of the list, or of the one object in a table.
fn version_of(seen: &Value) -> String {
    let own = seen["metadata"]["resourceVersion"].as_str().unwrap_or_default();
    let version = if own.is_empty() {
        seen["rows"][0]["object"]["metadata"]["resourceVersion"]
            .as_str()
            .unwrap_or_default()
    } else {
        own
    };
    version.to_owned()
}

/// Prints every change until Ctrl-C. A watch that ends is begun again; one that is too old lists again.
async fn follow(api: &Api, kind: &Kind, place: &Place, mut view: View, mut version: String) -> anyhow::Result<Outcome> {
    loop {
        let path = format!("{}&resourceVersion={}", place.watch, escaped(&version));
        let result = follow_once(api, kind, &path, &mut view, &mut version).await;
        match result {
            Ok(()) => {}
            Err(error)
                if error
                    .downcast_ref::<crate::cluster::ClusterError>()
                    .is_some_and(crate::cluster::ClusterError::is_expired) =>
            {
                let seen = place.fetch(api, view.is_table()).await?;
                view.show(kind, &seen)?;
                version = version_of(&seen);
            }
            Err(error) => return Err(error.context("watching")),
        }
        tokio::time::sleep(WATCH_AGAIN).await;
    }
}

async fn follow_once(api: &Api, kind: &Kind, path: &str, view: &mut View, version: &mut String) -> anyhow::Result<()> {
    let mut events = pin!(api.watch(path, view.is_table()).await?);
    while let Some(event) = events.next().await {
        match event? {
            WatchEvent::Added(object) | WatchEvent::Modified(object) | WatchEvent::Deleted(object) => {
                let newest = version_of(&object);
                if !newest.is_empty() {
                    *version = newest;
                }
                view.show(kind, &object)?;
            }
            WatchEvent::Bookmark(bookmark) => *version = bookmark.metadata.resource_version,
            WatchEvent::Error(_) => {}
        }
    }
    Ok(())
}

/// How objects are printed, across several kinds and the events of a watch.
struct View {
    format: Option<Format>,
    with_namespace: bool,
    no_headers: bool,
    headings_due: bool,
    /// Columns of the last table that had any: events of a watch come without.
    columns: Vec<Column>,
    /// Rows to print together, so that names given one by one line up.
    rows: Vec<Vec<String>>,
    /// Objects to print together as one List.
    objects: Vec<Value>,
    is_list: bool,
    is_watch: bool,
}

impl View {
    fn new(args: &GetArgs, is_list: bool) -> Self {
        Self {
            format: args.output,
            with_namespace: args.all_namespaces,
            no_headers: args.no_headers,
            headings_due: true,
            columns: Vec::new(),
            rows: Vec::new(),
            objects: Vec::new(),
            is_list: is_list && args.what.len() > 2,
            is_watch: args.watch,
        }
    }

    fn is_table(&self) -> bool {
        matches!(self.format, None | Some(Format::Wide))
    }

    fn is_for_people(&self) -> bool {
        self.is_table()
    }

    /// Takes an answer in; tables of another kind, lists and all of a watch are printed at once. Answers how many objects it
    /// had.
    fn show(&mut self, kind: &Kind, seen: &Value) -> anyhow::Result<usize> {
        match self.format {
            None | Some(Format::Wide) => {
                let table: Table = serde_json::from_value(seen.clone()).context("reading the API's table")?;
                let wide = self.format == Some(Format::Wide);
                if !table.column_definitions.is_empty() {
                    self.columns.clone_from(&table.column_definitions);
                }
                if self.headings_due && !table.rows.is_empty() {
                    if !self.rows.is_empty() {
                        self.finish()?;
                        output::line("");
                    }
                    if !self.no_headers {
                        self.rows.push(table.headings(wide, self.with_namespace));
                    }
                    self.headings_due = false;
                }
                self.rows.extend(table.cells(&self.columns, wide, self.with_namespace));
                if self.is_watch {
                    self.finish()?;
                }
                Ok(table.rows.len())
            }
            Some(Format::Name) => {
                let objects = items(seen);
                for object in &objects {
                    let name = object["metadata"]["name"].as_str().unwrap_or_default();
                    output::line(&format!("{}/{name}", kind.label()));
                }
                Ok(objects.len())
            }
            Some(Format::Json | Format::Yaml) => {
                let is_list = seen["items"].is_array();
                self.is_list |= is_list;
                // Items of a list come without their kind.
                let objects: Vec<_> = items(seen)
                    .into_iter()
                    .map(|mut object| {
                        object["apiVersion"] = json!(kind.api_version());
                        object["kind"] = json!(kind.kind);
                        object
                    })
                    .collect();
                let count = objects.len();
                self.objects.extend(objects);
                if self.is_watch {
                    self.finish()?;
                }
                Ok(count)
            }
        }
    }

    /// Prints what was taken in.
    fn finish(&mut self) -> anyhow::Result<()> {
        if self.is_table() {
            for line in aligned(&std::mem::take(&mut self.rows)) {
                output::line(&line);
            }
            return Ok(());
        }
        let objects = std::mem::take(&mut self.objects);
        if matches!(self.format, Some(Format::Name)) {
            return Ok(());
        }
        let value = if objects.len() == 1 && !self.is_list {
            objects.into_iter().next().unwrap_or_default()
        } else {
            json!({"apiVersion": "v1", "kind": "List", "metadata": {"resourceVersion": ""}, "items": objects})
        };
        output::line(&render(&value, self.format == Some(Format::Yaml))?);
        if self.is_watch && self.format == Some(Format::Yaml) {
            output::line("---");
        }
        // What follows in a watch are single objects.
        self.is_list = false;
        Ok(())
    }
}

fn items(seen: &Value) -> Vec<Value> {
    match &seen["items"] {
        Value::Array(items) => items.clone(),
        _ => vec![seen.clone()],
    }
}

/// The object as kubectl prints it: without the managers of its fields, which are noise for people.
fn render(value: &Value, as_yaml: bool) -> anyhow::Result<String> {
    let mut value = value.clone();
    let strip = |object: &mut Value| {
        if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
            metadata.remove("managedFields");
        }
    };
    match value.get_mut("items").and_then(Value::as_array_mut) {
        Some(items) => items.iter_mut().for_each(strip),
        None => strip(&mut value),
    }
    if as_yaml {
        let text = serde_saphyr::to_string(&value).context("writing YAML")?;
        Ok(text.trim_end().to_owned())
    } else {
        serde_json::to_string_pretty(&value).context("writing JSON")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(words: &[&str]) -> Result<Vec<(String, Option<String>)>, String> {
        let words: Vec<_> = words.iter().map(ToString::to_string).collect();
        parse_wanted(&words)
            .map(|all| all.into_iter().map(|one| (one.kind, one.name)).collect())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn kinds_and_names_are_taken_as_kubectl_takes_them() {
        let pair = |kind: &str, name: Option<&str>| (kind.to_owned(), name.map(str::to_owned));
        for (why, words, expected) in [
            ("nothing", &[][..], vec![pair("faragents", None)]),
            ("a kind", &["fa"][..], vec![pair("fa", None)]),
            ("kinds", &["fa,fn"][..], vec![pair("fa", None), pair("fn", None)]),
            (
                "names",
                &["fa", "a", "b"][..],
                vec![pair("fa", Some("a")), pair("fa", Some("b"))],
            ),
            (
                "with slashes",
                &["fa/a", "fn/b"][..],
                vec![pair("fa", Some("a")), pair("fn", Some("b"))],
            ),
        ] {
            assert_eq!(wanted(words).unwrap(), expected, "{why}");
        }
        for (why, words) in [
            ("names of two kinds", &["fa,fn", "a"][..]),
            ("mixed", &["fa/a", "b"][..]),
            ("empty name", &["fa/"][..]),
        ] {
            assert!(wanted(words).is_err(), "{why}");
        }
    }

    #[test]
    fn yaml_that_is_printed_reads_back_as_the_same_object() {
        let object = json!({
            "apiVersion": "v1", "kind": "X",
            "metadata": {"name": "a", "managedFields": [{}], "labels": {"yes": "no", "n": "0644", "t": "2026-01-01"}},
            "data": {"text": "one\ntwo: three\n", "empty": "", "number": "1e3", "null": "null", "tilde": "~"},
            "list": [], "map": {}, "float": 0.5, "int": 7, "flag": true, "nothing": null
        });
        let text = render(&object, true).unwrap();
        let back: Value = serde_saphyr::from_str(&text).unwrap();
        let mut expected = object;
        expected["metadata"].as_object_mut().unwrap().remove("managedFields");
        assert_eq!(back, expected, "{text}");
    }
}
