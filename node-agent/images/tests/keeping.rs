//! What the store keeps, for how long, and what a kill leaves.
#![allow(clippy::unwrap_used, reason = "a panic in a test is the report")]

mod support;

use far_images::{ImageError, ImageStore};
use std::{
    collections::BTreeSet,
    fs,
    io::{self, Read},
    os::unix::fs::PermissionsExt,
    path::Path,
};
use support::{Entry, archive, digest, file, files_below, folder, gzipped, place, plain, symlink, tar_of};

const ONE: &str = "example.com/one:1";
const TWO: &str = "example.com/two:1";

fn image(content: &str) -> Vec<u8> {
    archive(&[gzipped(&tar_of(&[
        folder("bin"),
        Entry {
            mode: 0o755,
            ..file("bin/program", content)
        },
        file("bin/data", "x"),
        symlink("sbin", "bin"),
    ]))])
}

#[test]
fn two_loads_in_different_places_give_the_same_bytes() {
    let (first, second) = (place(), place());
    let a = first.store.load_archive(image("x").as_slice(), ONE).unwrap();
    let b = second.store.load_archive(image("x").as_slice(), TWO).unwrap();
    assert_eq!(a.digest, b.digest);
    assert_ne!(a.rootfs, b.rootfs);
    let bytes = fs::read(&a.rootfs).unwrap();
    assert_eq!(digest(&bytes), digest(&fs::read(&b.rootfs).unwrap()));
    assert_eq!(bytes.len() % 4096, 0, "a block device of whole pages");
    // Superblock of squashfs 4.0: the magic, and an id that Linux has a decompressor for (1: zlib). Id 0 is refused by Linux.
    assert_eq!(&bytes[..4], b"hsqs");
    assert_eq!(u16::from_le_bytes([bytes[20], bytes[21]]), 1);
}

#[test]
fn an_image_is_found_by_name_and_by_digest_and_nothing_else() {
    let place = place();
    let loaded = place.store.load_archive(image("x").as_slice(), ONE).unwrap();
    for reference in [ONE, &loaded.digest, &format!("{ONE}@{}", loaded.digest)] {
        assert_eq!(
            place.store.resolve(reference).unwrap().digest,
            loaded.digest,
            "{reference}"
        );
    }
    let other = digest(b"other");
    for reference in [
        TWO,
        "example.com/one",
        "",
        &other,
        &format!("{ONE}@{other}"),
        "../../etc/passwd",
    ] {
        let error = place.store.resolve(reference).unwrap_err();
        assert!(matches!(error, ImageError::Unknown { .. }), "{reference}: {error}");
        assert!(
            error.to_string().contains("far image load"),
            "the way out is named: {error}"
        );
    }
}

#[test]
fn a_reference_that_cannot_be_one_is_refused_before_the_archive_is_read() {
    struct Untouched;
    impl Read for Untouched {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            panic!("the archive was read");
        }
    }
    let long = "a".repeat(513);
    for reference in ["", "with space", "new\nline", "nul\0", "ünicode", "a@sha256:00", &long] {
        let error = place().store.load_archive(Untouched, reference).unwrap_err();
        assert!(matches!(error, ImageError::Reference { .. }), "{reference:?}: {error}");
    }
}

#[test]
fn content_stays_while_a_reference_or_a_vm_has_it() {
    let place = place();
    let loaded = place.store.load_archive(image("x").as_slice(), ONE).unwrap();
    place.store.load_archive(image("x").as_slice(), TWO).unwrap();
    let nobody = BTreeSet::new();
    place.store.remove(ONE).unwrap();
    place.store.collect(&nobody).unwrap();
    assert!(loaded.rootfs.is_file(), "the second name has it");
    let in_use = BTreeSet::from([loaded.digest.clone()]);
    place.store.remove(TWO).unwrap();
    place.store.collect(&in_use).unwrap();
    assert!(loaded.rootfs.is_file(), "a microVM has it");
    assert!(place.store.resolve(TWO).is_err());
    place.store.collect(&nobody).unwrap();
    assert!(!loaded.rootfs.exists());
    assert!(place.store.list().unwrap().is_empty());
}

#[test]
fn a_moved_tag_names_the_new_image() {
    let place = place();
    let old = place.store.load_archive(image("old").as_slice(), ONE).unwrap();
    let new = place.store.load_archive(image("new").as_slice(), ONE).unwrap();
    assert_ne!(old.digest, new.digest);
    assert_eq!(place.store.resolve(ONE).unwrap().digest, new.digest);
    assert_eq!(place.store.list().unwrap().len(), 1);
}

#[test]
fn what_a_kill_left_is_gone_after_the_next_open_and_what_was_stored_is_there() {
    let place = place();
    let loaded = place.store.load_archive(image("x").as_slice(), ONE).unwrap();
    let folder = place.dir.path().join("images");
    let good = files_below(&folder);
    drop(place.store);
    fs::create_dir_all(folder.join("tmp/load")).unwrap();
    fs::write(folder.join("tmp/load/spool"), "half").unwrap();
    let hex = "0".repeat(64);
    fs::write(
        folder.join(format!("rootfs/{hex}.squashfs")),
        "renamed, but not described",
    )
    .unwrap();
    let store = ImageStore::open(&folder).unwrap();
    let mut left = files_below(&folder);
    left.sort();
    let mut good = good;
    good.sort();
    assert_eq!(left, good);
    assert_eq!(store.resolve(ONE).unwrap(), loaded);
    let mode = fs::metadata(&folder).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode, 0o700);
}

#[test]
fn a_lost_root_file_system_is_made_again_by_a_load() {
    let place = place();
    let loaded = place.store.load_archive(image("x").as_slice(), ONE).unwrap();
    let before = fs::read(&loaded.rootfs).unwrap();
    fs::remove_file(&loaded.rootfs).unwrap();
    let again = place.store.load_archive(image("x").as_slice(), ONE).unwrap();
    assert_eq!(fs::read(again.rootfs).unwrap(), before);
}

#[test]
fn a_source_that_breaks_off_leaves_nothing() {
    struct Broken<'a>(&'a [u8]);
    impl Read for Broken<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            match self.0.read(buffer)? {
                0 => Err(io::ErrorKind::ConnectionReset.into()),
                got => Ok(got),
            }
        }
    }
    let bytes = image("x");
    for end in (0..bytes.len() - 1024).step_by(700) {
        let place = place();
        place.store.load_archive(Broken(&bytes[..end]), ONE).unwrap_err();
        assert_eq!(files_below(place.dir.path()), Vec::<String>::new(), "cut at {end}");
    }
}

#[test]
fn a_missing_program_is_told_before_a_boot() {
    let place = place();
    let loaded = place.store.load_archive(image("x").as_slice(), ONE).unwrap();
    for (path, wanted) in [
        ("/bin/program", true),
        ("/sbin/program", true),
        ("/bin/missing", false),
        ("/bin/data", false),
        ("/bin", false),
        ("/", false),
        ("", false),
    ] {
        assert_eq!(
            place
                .store
                .may_have_programs(&loaded.digest, &[path.to_owned()])
                .unwrap(),
            [wanted],
            "{path}"
        );
    }
}

#[test]
fn listing_and_finding_images_never_read_what_programs_they_have() {
    let place = place();
    let loaded = place.store.load_archive(image("x").as_slice(), ONE).unwrap();
    let hex = &loaded.digest["sha256:".len()..];
    let store = place.dir.path().join("images");
    let description = fs::read_to_string(store.join(format!("images/{hex}.json"))).unwrap();
    assert!(!description.contains("/bin/program@") && !description.contains("/sbin@"));
    fs::write(store.join(format!("programs/{hex}.json")), "not JSON").unwrap();
    assert_eq!(place.store.resolve(ONE).unwrap(), loaded);
    assert_eq!(place.store.list().unwrap(), std::slice::from_ref(&loaded));
    assert!(
        place
            .store
            .may_have_programs(&loaded.digest, &["/bin/program".to_owned()])
            .is_err()
    );
}

#[test]
fn an_image_with_too_many_programs_is_kept_without_a_list_of_them() {
    let place = place();
    let many: Vec<Entry> = (0..12_000)
        .map(|n| symlink(&format!("{}{n}", "n".repeat(90)), "x"))
        .collect();
    let bytes = archive(&[gzipped(&tar_of(&many))]);
    let loaded = place.store.load_archive(bytes.as_slice(), ONE).unwrap();
    let error = place
        .store
        .may_have_programs(&loaded.digest, &["/missing".to_owned()])
        .unwrap_err();
    assert!(matches!(error, ImageError::ProgramsUnknown { .. }), "{error}");
    let hex = &loaded.digest["sha256:".len()..];
    let list = place.dir.path().join(format!("images/programs/{hex}.json"));
    assert!(!list.exists());
    place.store.remove(ONE).unwrap();
    place.store.collect(&BTreeSet::new()).unwrap();
    assert_eq!(
        files_below(&place.dir.path().join("images/rootfs")),
        Vec::<String>::new()
    );
}

#[test]
fn a_broken_image_hides_no_other_and_is_made_again_by_a_load() {
    type Break = fn(&Path, &str);
    let breaks: [(&str, Break); 3] = [
        ("no root file system", |store, hex| {
            fs::remove_file(store.join(format!("rootfs/{hex}.squashfs"))).unwrap();
        }),
        ("a description that is none", |store, hex| {
            fs::write(store.join(format!("images/{hex}.json")), "{").unwrap();
        }),
        ("a description that cannot be read", |store, hex| {
            let file = store.join(format!("images/{hex}.json"));
            fs::remove_file(&file).unwrap();
            fs::create_dir(&file).unwrap();
        }),
    ];
    for (why, make_broken) in breaks {
        let place = place();
        let broken = place.store.load_archive(image("one").as_slice(), ONE).unwrap();
        let good = place.store.load_archive(image("two").as_slice(), TWO).unwrap();
        make_broken(&place.dir.path().join("images"), &broken.digest["sha256:".len()..]);
        assert_eq!(place.store.list().unwrap(), std::slice::from_ref(&good), "{why}");
        assert_eq!(place.store.resolve(TWO).unwrap(), good, "{why}");
        assert!(place.store.resolve(ONE).is_err(), "{why}");
        if why != "a description that cannot be read" {
            let again = place.store.load_archive(image("one").as_slice(), ONE).unwrap();
            assert_eq!(again, broken, "{why}");
        }
    }
}

#[test]
fn content_that_a_moved_tag_left_goes_when_it_is_collected_and_nobody_has_it() {
    let place = place();
    let old = place.store.load_archive(image("old").as_slice(), ONE).unwrap();
    let new = place.store.load_archive(image("new").as_slice(), ONE).unwrap();
    let in_use = BTreeSet::from([old.digest.clone()]);
    place.store.collect(&in_use).unwrap();
    assert!(old.rootfs.is_file(), "a microVM has it");
    place.store.collect(&BTreeSet::new()).unwrap();
    assert!(!old.rootfs.exists());
    assert_eq!(place.store.resolve(ONE).unwrap(), new);
    let of_old: Vec<String> = files_below(place.dir.path())
        .into_iter()
        .filter(|path| path.contains(&old.digest["sha256:".len()..]))
        .collect();
    assert_eq!(of_old, Vec::<String>::new());
}

#[test]
fn loads_of_one_image_at_the_same_time_end_in_one_image() {
    let place = place();
    let bytes = image("x");
    std::thread::scope(|scope| {
        for number in 0..4 {
            let (store, bytes) = (&place.store, &bytes);
            scope.spawn(move || {
                store
                    .load_archive(bytes.as_slice(), &format!("example.com/{number}:1"))
                    .unwrap()
            });
        }
    });
    let listed = place.store.list().unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0].references.len(), 4);
}

#[test]
fn an_image_without_layers_is_an_empty_root() {
    let place = place();
    let loaded = place.store.load_archive(archive(&[]).as_slice(), ONE).unwrap();
    assert!(loaded.size_bytes > 0);
    let empty = archive(&[plain(tar_of(&[]))]);
    place.store.load_archive(empty.as_slice(), TWO).unwrap();
}
