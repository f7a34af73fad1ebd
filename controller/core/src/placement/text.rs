//! What is said when no blade will do.

use std::{cmp::Reverse, collections::BTreeMap};

use super::{filters::Cause, fleet::Fleet, request::Request};

/// No blade will do; the text counts blades by cause as kube-scheduler does.
#[derive(Debug, Clone, Default, PartialEq, Eq, thiserror::Error)]
#[error("{}", self.text())]
pub struct Unschedulable {
    /// Blades looked at.
    pub blades: usize,
    /// How many of them have each cause; one blade may have several.
    pub causes: BTreeMap<Cause, usize>,
    /// Sentences about requests that no blade could ever hold.
    pub never: Vec<String>,
}

impl Unschedulable {
    fn text(&self) -> String {
        let mut text = format!("0/{} blades are available", self.blades);
        let mut counted: Vec<_> = self.causes.iter().collect();
        counted.sort_by_key(|(cause, count)| (Reverse(**count), *cause));
        for (index, (cause, count)) in counted.into_iter().enumerate() {
            text += &format!("{} {count} {cause}", if index == 0 { ":" } else { "," });
        }
        text += ".";
        for sentence in &self.never {
            text += &format!(" {sentence}");
        }
        text
    }
}

/// Sentences about what no blade could hold even when empty.
pub(super) fn never(fleet: &Fleet, request: &Request) -> Vec<String> {
    let mut sentences = Vec::new();
    let (mut cpu, mut memory) = (0, 0);
    for (_, _, blade) in fleet.blades() {
        cpu = cpu.max(blade.cpu_room());
        memory = memory.max(blade.memory_room().saturating_sub(blade.overhead_mib));
    }
    let is_known = fleet.known() > 0;
    if is_known && request.cpu_millis > cpu {
        sentences.push(format!(
            "spec.cpu ({}m) is more than any blade has ({cpu}m).",
            request.cpu_millis
        ));
    }
    if is_known && request.memory_mib > memory {
        sentences.push(format!(
            "spec.memory ({} MiB) is more than any blade has ({memory} MiB).",
            request.memory_mib
        ));
    }
    if let Some(name) = &request.node_name {
        let is_there = fleet.number(name).is_some_and(|number| fleet.blade(number).is_some());
        if !is_there {
            sentences.push(format!("spec.nodeName: there is no blade {name:?}."));
        }
    }
    sentences
}
