//! The layer reader against damaged input, and the merge of layers against a model that is too simple to be wrong.
#![allow(clippy::unwrap_used, reason = "a panic in a test is the report")]

mod support;

use far_images::Limits;
use proptest::prelude::*;
use std::collections::BTreeMap;
use support::{Entry, archive, file, files_below, folder, hard_link, listed_paths, place_with, plain, symlink, tar_of};

const REFERENCE: &str = "example.com/property:1";

fn valid_layer() -> Vec<u8> {
    let pax = support::entry(tar::EntryType::XHeader, "pax", "", b"18 path=long/name\n".to_vec());
    tar_of(&[
        folder("bin"),
        Entry {
            mode: 0o755,
            ..file("bin/program", vec![7; 1500])
        },
        symlink("sbin", "bin"),
        hard_link("second", "bin/program"),
        pax,
        file("short", "x"),
        file("bin/.wh.old", ""),
        file("deep/er/.wh..wh..opq", ""),
    ])
}

/// Puts right checksums where headers may be, so that damage is read instead of being found by its sum.
fn with_checksums(mut tar: Vec<u8>) -> Vec<u8> {
    for block in tar
        .chunks_exact_mut(512)
        .filter(|block| block.iter().any(|byte| *byte != 0))
    {
        let mut header = tar::Header::new_old();
        header.as_mut_bytes().copy_from_slice(block);
        header.set_cksum();
        block.copy_from_slice(header.as_bytes());
    }
    tar
}

/// One entry of a random layer, over a few short paths so that they meet.
#[derive(Debug, Clone)]
enum Step {
    File(String, u8),
    Folder(String),
    Remove(String, &'static str),
    Hide(String),
}

/// Few folders, so that layers meet in them; a file mostly has a name that no folder has, else nearly every case is refused.
fn folders() -> impl Strategy<Value = String> {
    prop::collection::vec(prop::sample::select(vec!["a", "b"]), 1..4).prop_map(|names| names.join("/"))
}

fn files() -> impl Strategy<Value = String> {
    let name = prop_oneof![9 => Just("f"), 9 => Just("g"), 1 => Just("a")];
    (folders(), name).prop_map(|(folder, name)| format!("{folder}/{name}"))
}

fn steps() -> impl Strategy<Value = Vec<Vec<Step>>> {
    let step = prop_oneof![
        6 => (files(), any::<u8>()).prop_map(|(path, byte)| Step::File(path, byte)),
        1 => folders().prop_map(Step::Folder),
        3 => (folders(), prop::sample::select(vec!["a", "b", "f"])).prop_map(|(path, name)| Step::Remove(path, name)),
        2 => folders().prop_map(Step::Hide),
    ];
    prop::collection::vec(prop::collection::vec(step, 2..9), 2..4)
}

/// What a path is in the model.
#[derive(Debug, Clone, PartialEq)]
enum Thing {
    Folder,
    File,
}

/// Layers one by one: first everything that the layer hides goes, then everything that it brings comes. `None`: an entry lies below
/// a file, which is refused.
fn model(layers: &[Vec<Step>]) -> Option<BTreeMap<String, Thing>> {
    let mut seen: BTreeMap<String, Thing> = BTreeMap::new();
    for layer in layers {
        let lower = seen.clone();
        let mut brought: BTreeMap<String, Thing> = BTreeMap::new();
        let mut gone: Vec<String> = Vec::new();
        for step in layer {
            match step {
                Step::Remove(path, name) => gone.push(format!("{path}/{name}")),
                Step::Hide(path) => gone.push(format!("{path}/")),
                Step::File(path, _) | Step::Folder(path) => {
                    let thing = if matches!(step, Step::File(..)) {
                        Thing::File
                    } else {
                        Thing::Folder
                    };
                    for (at, _) in path.match_indices('/') {
                        let parent = path[..at].to_owned();
                        // What is there now: this layer's, else the lower one's unless it was hidden or replaced before.
                        let is_gone = |path: &str| gone.iter().any(|gone| is_under(path, gone));
                        let there = brought.get(&parent).or_else(|| {
                            let below_replaced = brought
                                .iter()
                                .any(|(name, thing)| *thing == Thing::File && parent.starts_with(&format!("{name}/")));
                            lower.get(&parent).filter(|_| !is_gone(&parent) && !below_replaced)
                        });
                        if there == Some(&Thing::File) {
                            return None;
                        }
                        brought.insert(parent, Thing::Folder);
                    }
                    if thing == Thing::File {
                        // A file in the place of a folder takes everything with it.
                        brought.retain(|other, _| !other.starts_with(&format!("{path}/")));
                        gone.push(format!("{path}/"));
                    }
                    brought.insert(path.clone(), thing);
                }
            }
        }
        seen.retain(|path, _| !gone.iter().any(|gone| is_under(path, gone)));
        seen.extend(brought);
    }
    Some(seen)
}

/// `gone` is a path that goes with all below it, or `path/` for only what is below.
fn is_under(path: &str, gone: &str) -> bool {
    match gone.strip_suffix('/') {
        Some(_) => path.starts_with(gone),
        None => path == gone || path.starts_with(&format!("{gone}/")),
    }
}

fn entries_of(layer: &[Step]) -> Vec<Entry> {
    layer
        .iter()
        .map(|step| match step {
            Step::File(path, byte) => file(path, vec![*byte; 3]),
            Step::Folder(path) => folder(path),
            Step::Remove(path, name) => file(&format!("{path}/.wh.{name}"), ""),
            Step::Hide(path) => file(&format!("{path}/.wh..wh..opq"), ""),
        })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn a_damaged_layer_is_loaded_or_refused_and_never_half(
        damage in prop::collection::vec((0_usize..6000, any::<u8>()), 1..12),
        cut in prop::option::of(0_usize..6000),
    ) {
        let mut tar = valid_layer();
        for (at, byte) in damage {
            let len = tar.len();
            tar[at % len] = byte;
        }
        tar.truncate(cut.unwrap_or(usize::MAX).max(1));
        let layer = plain(with_checksums(tar));
        let limits = Limits { content_bytes: 1 << 20, ..Limits::default() };
        let place = place_with(limits);
        match place.store.load_archive(archive(&[layer]).as_slice(), REFERENCE) {
            Ok(image) => prop_assert_eq!(place.store.resolve(REFERENCE).unwrap(), image),
            Err(error) => {
                prop_assert!(error.is_the_images_fault(), "{:?}", error);
                prop_assert!(files_below(place.dir.path()).is_empty());
            }
        }
    }

    #[test]
    fn any_bytes_as_an_archive_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..4000)) {
        let place = place_with(Limits::default());
        prop_assert!(place.store.load_archive(bytes.as_slice(), REFERENCE).is_err());
        prop_assert!(files_below(place.dir.path()).is_empty());
    }

    #[test]
    fn layers_merge_as_the_model_says(layers in steps()) {
        let place = place_with(Limits::default());
        let packed: Vec<_> = layers.iter().map(|layer| plain(tar_of(&entries_of(layer)))).collect();
        let loaded = place.store.load_archive(archive(&packed).as_slice(), REFERENCE);
        match (model(&layers), loaded) {
            (None, loaded) => prop_assert!(loaded.is_err()),
            (Some(wanted), loaded) => {
                let wanted: Vec<String> = wanted
                    .into_iter()
                    .map(|(path, thing)| if thing == Thing::Folder { format!("/{path}/") } else { format!("/{path}") })
                    .collect();
                prop_assert_eq!(listed_paths(&loaded.unwrap()), wanted);
            }
        }
    }
}
