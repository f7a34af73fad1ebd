//! One served kind in one version: everything the handlers must know about it.

use std::sync::Arc;

use serde_json::Value;

use crate::error::Subject;
use crate::schema::cel::Rules;

/// Where a table cell comes from.
#[derive(Clone)]
pub(crate) enum Cell {
    /// JSONPath such as `.status.phase`.
    Path(String),
    Computed(fn(&Value) -> Value),
}

#[derive(Clone)]
pub(crate) struct Column {
    pub name: String,
    /// `string`, `integer`, `number`, `boolean` or `date`.
    pub kind: String,
    pub format: String,
    pub description: String,
    /// 0 is always shown, more only with `-o wide`.
    pub priority: i64,
    pub cell: Cell,
}

#[derive(Debug, Clone)]
pub(crate) struct ScalePaths {
    pub spec: String,
    pub status: String,
    pub selector: Option<String>,
}

/// Who answers for the kind.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Origin {
    BuiltIn,
    Custom,
}

pub(crate) struct Resource {
    pub group: String,
    pub version: String,
    pub kind: String,
    pub list_kind: String,
    pub plural: String,
    pub singular: String,
    pub short_names: Vec<String>,
    pub categories: Vec<String>,
    pub namespaced: bool,
    /// Collection in the store; kinds that share one are the same objects.
    pub storage: String,
    /// Version that the store holds.
    pub storage_version: String,
    /// Structural schema of the whole object, `metadata` included.
    pub schema: Arc<Value>,
    pub rules: Option<Arc<Rules>>,
    pub has_status: bool,
    pub scale: Option<ScalePaths>,
    pub columns: Vec<Column>,
    /// JSONPaths usable in field selectors besides `metadata.name` and `metadata.namespace`.
    pub selectable: Vec<String>,
    pub origin: Origin,
    /// `metadata.generation` counts changes of the wanted state.
    pub has_generation: bool,
}

impl Resource {
    pub(crate) fn api_version(&self) -> String {
        if self.group.is_empty() {
            self.version.clone()
        } else {
            format!("{}/{}", self.group, self.version)
        }
    }

    pub(crate) fn storage_api_version(&self) -> String {
        if self.group.is_empty() {
            self.storage_version.clone()
        } else {
            format!("{}/{}", self.group, self.storage_version)
        }
    }

    pub(crate) fn subject(&self, name: &str) -> Subject {
        Subject {
            group: self.group.clone(),
            plural: self.plural.clone(),
            kind: self.kind.clone(),
            name: name.to_owned(),
        }
    }

    pub(crate) fn is(&self, group: &str, plural: &str) -> bool {
        self.group == group && self.plural == plural
    }

    pub(crate) fn is_custom(&self) -> bool {
        self.origin == Origin::Custom
    }
}
