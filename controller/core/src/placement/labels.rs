//! Labels and what is asked of them: the operators of node selectors and label selectors.

use std::collections::BTreeMap;

/// Key to value.
pub type Labels = BTreeMap<String, String>;

/// What one requirement asks of a label's value.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Operator {
    /// The label is there with one of these values.
    In(Vec<String>),
    /// The label is not there, or has none of these values.
    NotIn(Vec<String>),
    /// The label is there.
    Exists,
    /// The label is not there.
    DoesNotExist,
    /// The label is there, a whole number, and more than this.
    Gt(i64),
    /// The label is there, a whole number, and less than this.
    Lt(i64),
}

/// One requirement on one label.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Requirement {
    /// Name of the label.
    pub key: String,
    /// What is asked of it.
    pub operator: Operator,
}

impl Requirement {
    /// Whether the labels are as asked (apimachinery `labels.Requirement.Matches`).
    #[must_use]
    pub fn matches(&self, labels: &Labels) -> bool {
        let value = labels.get(&self.key);
        let number = || value.and_then(|value| value.parse::<i64>().ok());
        match &self.operator {
            Operator::In(values) => value.is_some_and(|value| values.contains(value)),
            Operator::NotIn(values) => value.is_none_or(|value| !values.contains(value)),
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
            Operator::Gt(bound) => number().is_some_and(|number| number > *bound),
            Operator::Lt(bound) => number().is_some_and(|number| number < *bound),
        }
    }
}

/// Requirements that must all hold; without any, everything matches.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Selector {
    /// All of them.
    pub requirements: Vec<Requirement>,
}

impl Selector {
    /// Whether the labels are as asked.
    #[must_use]
    pub fn matches(&self, labels: &Labels) -> bool {
        self.requirements.iter().all(|one| one.matches(labels))
    }

    /// A label of which every match must have one of these values: where an index may look first.
    pub(super) fn handle(&self) -> Option<(&str, &[String])> {
        self.requirements.iter().find_map(|one| match &one.operator {
            Operator::In(values) => Some((one.key.as_str(), values.as_slice())),
            Operator::NotIn(_) | Operator::Exists | Operator::DoesNotExist | Operator::Gt(_) | Operator::Lt(_) => None,
        })
    }
}
