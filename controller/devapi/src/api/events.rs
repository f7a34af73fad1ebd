//! Events are stored once, as core/v1; `events.k8s.io/v1` is another view of the same objects.

use serde_json::{Map, Value, json};

/// (events.k8s.io/v1, core/v1)
const RENAMED: [(&str, &str); 7] = [
    ("regarding", "involvedObject"),
    ("note", "message"),
    ("deprecatedSource", "source"),
    ("deprecatedFirstTimestamp", "firstTimestamp"),
    ("deprecatedLastTimestamp", "lastTimestamp"),
    ("deprecatedCount", "count"),
    ("reportingController", "reportingComponent"),
];

pub(crate) fn to_core(event: &mut Value) {
    rename(event, RENAMED.iter().copied());
    event["apiVersion"] = json!("v1");
}

pub(crate) fn from_core(event: &mut Value) {
    rename(event, RENAMED.iter().map(|(new, core)| (*core, *new)));
    event["apiVersion"] = json!("events.k8s.io/v1");
}

fn rename<'a>(event: &mut Value, names: impl Iterator<Item = (&'a str, &'a str)>) {
    let Some(map) = event.as_object_mut() else { return };
    let moved: Map<String, Value> = names
        .filter_map(|(from, to)| map.remove(from).map(|value| (to.to_owned(), value)))
        .collect();
    map.extend(moved);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_survives_the_way_through_both_versions() {
        let original = json!({"apiVersion": "events.k8s.io/v1", "kind": "Event", "regarding": {"name": "a"}, "note": "n",
            "reportingController": "c", "reportingInstance": "i", "deprecatedCount": 2});
        let mut event = original.clone();
        to_core(&mut event);
        assert_eq!(event["involvedObject"]["name"], "a");
        assert_eq!(event["reportingComponent"], "c");
        from_core(&mut event);
        assert_eq!(event, original);
    }
}
