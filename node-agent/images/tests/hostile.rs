//! Archives that no honest builder makes, and honest ones that look like them.
#![allow(clippy::unwrap_used, reason = "a panic in a test is the report")]

mod support;

use far_images::{ImageError, Limits};
use support::{
    Entry, Layer, archive, digest, entry, file, files_below, folder, gzipped, hard_link, listed, load, place,
    place_with, plain, symlink, tar_of, zstd_frames,
};
use tar::EntryType;

const REFERENCE: &str = "example.com/test:1";

fn refusal(layers: &[Layer], limits: Limits) -> String {
    let place = place_with(limits);
    let error = place
        .store
        .load_archive(archive(layers).as_slice(), REFERENCE)
        .expect_err("this image must be refused");
    assert!(error.is_the_images_fault(), "{error:?}");
    assert!(place.store.list().unwrap().is_empty());
    assert!(matches!(
        place.store.resolve(REFERENCE),
        Err(ImageError::Unknown { .. })
    ));
    assert_eq!(
        files_below(place.dir.path()),
        Vec::<String>::new(),
        "nothing is left behind: {error}"
    );
    error.to_string()
}

#[test]
fn an_entry_that_breaks_a_rule_is_refused_by_layer_and_name_and_leaves_nothing() {
    let long_name = "n".repeat(99);
    let cases: &[(&str, Vec<Entry>, &str)] = &[
        ("parent", vec![file("../escaped", "x")], "../escaped"),
        ("parent inside", vec![file("a/../../escaped", "x")], "a/../../escaped"),
        (
            "hard link outside",
            vec![hard_link("passwd", "../../etc/passwd")],
            "passwd",
        ),
        ("hard link to nothing", vec![hard_link("b", "missing")], "\"b\""),
        ("hard link to a folder", vec![folder("d"), hard_link("b", "d")], "\"b\""),
        (
            "through a symlink",
            vec![symlink("etc", "/etc"), file("etc/shadow", "x")],
            "etc/shadow",
        ),
        ("below a file", vec![file("a", "x"), file("a/b", "x")], "a/b"),
        ("symlink to nothing", vec![symlink("a", "")], "\"a\""),
        ("whiteout of nothing", vec![file("d/.wh.", "")], "d/.wh."),
        ("whiteout of the parent", vec![file("d/.wh...", "")], "d/.wh..."),
        ("the root as a file", vec![file("./", "x")], "\"./\""),
        (
            "unknown type",
            vec![entry(EntryType::new(b'V'), &long_name, "", Vec::new())],
            &long_name,
        ),
    ];
    for (why, entries, name) in cases {
        let layer = plain(tar_of(entries));
        let said = refusal(std::slice::from_ref(&layer), Limits::default());
        assert!(said.contains(name), "{why}: {said}");
        assert!(said.contains(&digest(&layer.blob)), "{why}: the layer is named: {said}");
    }
}

#[test]
fn long_names_of_extended_headers_follow_the_same_rules() {
    for (kind, bytes, entry_name) in [
        (b'x', b"27 path=a/../../../escaped\n".to_vec(), "escaped"),
        (b'L', b"a/../../../escaped\0".to_vec(), "escaped"),
        (b'x', b"12 path=a\0b\n".to_vec(), "a\0b"),
    ] {
        let entries = [entry(EntryType::new(kind), "long", "", bytes), file("innocent", "x")];
        let said = refusal(&[plain(tar_of(&entries))], Limits::default());
        let shown = format!("{entry_name:?}");
        assert!(said.contains(shown.trim_matches('"')), "{said}");
    }
}

#[test]
fn an_extended_header_of_any_size_is_not_read_into_memory() {
    let bytes = vec![b'a'; 64 << 20];
    for kind in [b'x', b'L', b'K'] {
        let entries = [
            entry(EntryType::new(kind), "long", "", bytes.clone()),
            file("innocent", "x"),
        ];
        let said = refusal(&[gzipped(&tar_of(&entries))], Limits::default());
        assert!(said.contains("extended header"), "{said}");
    }
}

#[test]
fn sparse_files_are_refused_because_a_header_makes_them_any_size() {
    let entries = [entry(EntryType::GNUSparse, "huge", "", Vec::new())];
    assert!(refusal(&[plain(tar_of(&entries))], Limits::default()).contains("huge"));
    let pax = b"22 GNU.sparse.major=1\n".to_vec();
    let entries = [entry(EntryType::XHeader, "pax", "", pax), file("huge", "x")];
    assert!(refusal(&[plain(tar_of(&entries))], Limits::default()).contains("huge"));
}

#[test]
fn every_limit_stops_an_image() {
    let small = Limits {
        archive_bytes: 4 << 20,
        content_bytes: 1 << 20,
        entries: 50,
        name_bytes: 4 << 10,
        ..Limits::default()
    };
    let many: Vec<Entry> = (0..60).map(|n| file(&format!("f{n}"), "")).collect();
    let half: Vec<Entry> = (0..30).map(|n| file(&format!("f{n}"), "")).collect();
    let links: Vec<Entry> = std::iter::once(file("big", vec![1; 300 << 10]))
        .chain((0..40).map(|n| hard_link(&format!("l{n}"), "big")))
        .collect();
    let long_targets: Vec<Entry> = std::iter::once(symlink("long", &"t".repeat(99)))
        .chain((0..45).map(|n| hard_link(&format!("l{n}"), "long")))
        .collect();
    let deep: Vec<Entry> = (0..5).map(|n| file(&format!("{n}{}/f", "/d".repeat(20)), "")).collect();
    let nested = [file("ends here", "x")];
    let mut after_the_end = tar_of(&nested);
    after_the_end.resize(8 << 20, 0);
    let cases = [
        (
            "a bomb of one file",
            vec![gzipped(&tar_of(&[file("zeros", vec![0; 8 << 20])]))],
        ),
        (
            "bombs of two layers",
            vec![
                gzipped(&tar_of(&[file("a", vec![0; 700 << 10])])),
                gzipped(&tar_of(&[file("a", vec![1; 700 << 10])])),
            ],
        ),
        ("entries of one layer", vec![plain(tar_of(&many))]),
        (
            "entries of two layers",
            vec![plain(tar_of(&half)), plain(tar_of(&half))],
        ),
        ("hard links to a long symlink", vec![plain(tar_of(&long_targets))]),
        ("folders that nobody described", vec![plain(tar_of(&deep))]),
        ("hard links to a large file", vec![plain(tar_of(&links))]),
        ("padding behind the end", vec![gzipped(&after_the_end)]),
        ("the archive", vec![plain(vec![7; 5 << 20])]),
    ];
    for (why, layers) in cases {
        let said = refusal(&layers, small);
        assert!(said.contains("too large"), "{why}: {said}");
    }
}

#[test]
fn a_blob_that_is_not_what_its_name_says_is_refused() {
    let good = archive(&[plain(tar_of(&[file("a", "content that is unique")]))]);
    let at = good
        .windows(22)
        .position(|window| window == b"content that is unique")
        .unwrap();
    let mut flipped = good.clone();
    flipped[at] ^= 1;
    for (why, bytes) in [
        ("flipped bit", flipped),
        ("cut off", good[..at].to_vec()),
        ("empty", Vec::new()),
        ("no tar", vec![b'x'; 4096]),
    ] {
        let place = place();
        let error = place.store.load_archive(bytes.as_slice(), REFERENCE).expect_err(why);
        assert!(error.is_the_images_fault(), "{why}: {error:?}");
        assert_eq!(files_below(place.dir.path()), Vec::<String>::new(), "{why}");
    }
}

#[test]
fn a_layer_that_unpacks_to_something_else_than_the_config_says_is_refused() {
    let mut layer = gzipped(&tar_of(&[file("a", "x")]));
    layer.diff_id = digest(b"something else");
    let said = refusal(std::slice::from_ref(&layer), Limits::default());
    assert!(
        said.contains(&layer.diff_id) && said.contains(&digest(&layer.blob)),
        "{said}"
    );
}

#[test]
fn a_packed_layer_that_is_cut_off_is_refused() {
    let tar = tar_of(&[file("a", vec![9; 200_000])]);
    for mut layer in [gzipped(&tar), zstd_frames(&tar, 50_000)] {
        layer.blob.truncate(layer.blob.len() / 2);
        let said = refusal(std::slice::from_ref(&layer), Limits::default());
        assert!(said.contains(&digest(&layer.blob)), "{said}");
    }
}

#[test]
fn every_packing_gives_the_same_root_file_system() {
    let content: Vec<u8> = (0..90_000_u32).flat_map(u32::to_le_bytes).collect();
    let tar = tar_of(&[
        folder("bin"),
        Entry {
            mode: 0o755,
            ..file("bin/program", content)
        },
        symlink("sh", "bin/program"),
    ]);
    let mut seen = Vec::new();
    for layer in [plain(tar.clone()), gzipped(&tar), zstd_frames(&tar, 150_000)] {
        let place = place();
        let image = place
            .store
            .load_archive(archive(&[layer]).as_slice(), REFERENCE)
            .unwrap();
        seen.push(digest(&std::fs::read(&image.rootfs).unwrap()));
    }
    assert_eq!(seen[0], seen[1]);
    assert_eq!(seen[0], seen[2]);
}

#[test]
fn devices_and_pipes_are_left_out() {
    let test = "devices_and_pipes_are_left_out";
    let (_place, image) = load(&[&[
        entry(EntryType::Char, "dev/null", "", Vec::new()),
        entry(EntryType::Block, "disk", "", Vec::new()),
        entry(EntryType::Fifo, "pipe", "", Vec::new()),
        file("kept", "x"),
    ]]);
    let Some(lines) = listed(test, &image.unwrap()) else {
        return;
    };
    let text = lines.join("\n");
    assert!(text.contains("/kept"), "{text}");
    assert!(
        !text.contains("null") && !text.contains("disk") && !text.contains("pipe"),
        "{text}"
    );
}

#[test]
fn layers_replace_remove_and_hide_as_another_tool_sees_it() {
    let test = "layers_replace_remove_and_hide_as_another_tool_sees_it";
    let lower = [
        Entry {
            owner: 1000,
            ..folder("./")
        },
        symlink("link", "/etc/shadow"),
        file("replaced/by-a-file", "x"),
        file("gone", "x"),
        file("opaque/low/old", "x"),
        file("partly/low", "x"),
        Entry {
            mode: 0o4755,
            owner: 7,
            ..file("setuid", "12345")
        },
        hard_link("second", "setuid"),
    ];
    let upper = [
        file("link", "now a file"),
        file("replaced", "now a file"),
        file(".wh.gone", ""),
        file("opaque/low/new", "y"),
        file("opaque/.wh..wh..opq", ""),
        file("partly/high", "y"),
        file(".wh.partly", ""),
        file("twice", "first"),
        file("twice", "second, longer"),
    ];
    let (_place, image) = load(&[&lower, &upper]);
    let Some(lines) = listed(test, &image.unwrap()) else {
        return;
    };
    assert_eq!(
        lines,
        [
            "drwxr-xr-x 0/0",
            "drwxr-xr-x 0/0 /dev",
            "-rw-r--r-- 0/0 10 /link",
            "drwxr-xr-x 0/0 /opaque",
            "drwxr-xr-x 0/0 /opaque/low",
            "-rw-r--r-- 0/0 1 /opaque/low/new",
            "drwxr-xr-x 0/0 /partly",
            "-rw-r--r-- 0/0 1 /partly/high",
            "drwxr-xr-x 0/0 /proc",
            "-rw-r--r-- 0/0 10 /replaced",
            "drwxr-xr-x 0/0 /run",
            "-rwsr-xr-x 7/7 5 /second",
            "-rwsr-xr-x 7/7 5 /setuid",
            "drwxr-xr-x 0/0 /sys",
            "drwxrwxrwt 0/0 /tmp",
            "-rw-r--r-- 0/0 14 /twice",
        ]
    );
}
