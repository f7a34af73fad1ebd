//! A guest kernel from the distribution's own packages, as an ordinary user.
//!
//! The package's name moves with every security update, so it is resolved through the meta package; what was taken is
//! recorded in `kernel.json`. Nothing is installed: the package is downloaded and unpacked in a folder of its own.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde::{Deserialize, Serialize};

use crate::{BuildError, bzimage, modules, write};

/// Meta packages by distribution: the smallest kernel that has virtio, vsock, squashfs and overlay.
const META_PACKAGES: [&str; 2] = ["linux-image-cloud-amd64", "linux-image-virtual"];

/// What a kernel folder says about itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Package the kernel came from, or the file it was given as.
    pub package: String,
    /// Release, as `uname -r` in the guest will say.
    pub release: String,
    /// SHA-256 of `vmlinux`.
    pub vmlinux_sha256: String,
    /// Names of the modules, in load order.
    pub modules: Vec<String>,
}

/// Where the kernel comes from.
#[derive(Debug, Clone)]
pub enum Source {
    /// The distribution's package, by `apt-get download`.
    Apt,
    /// Packages already on disk: the image, and on Ubuntu its modules.
    Debs(Vec<PathBuf>),
}

/// Fills `out` with `vmlinux`, `modules/` (with `order`) and `kernel.json`. Versions are kept below `cache`, so that a
/// second call for the same version only compares.
///
/// # Errors
/// [`BuildError`]; `out` is as before or complete.
pub fn build(source: &Source, cache: &Path, out: &Path) -> Result<Record, BuildError> {
    let (name, debs) = match source {
        Source::Debs(debs) => {
            let first = debs.first().ok_or(BuildError::Option {
                option: "--deb",
                what: "name at least one package".into(),
            })?;
            (
                format!("deb-{}", &write::sha256(&write::read(first)?)[..16]),
                debs.clone(),
            )
        }
        Source::Apt => (resolve()?, Vec::new()),
    };
    let kept = cache.join(&name);
    let record = match read_record(&kept) {
        Some(record) => record,
        None => make(&name, debs, cache, &kept)?,
    };
    copy(&kept, out, &record)?;
    Ok(record)
}

/// `kernel.json` is written last: where it is, all is.
fn read_record(kept: &Path) -> Option<Record> {
    serde_json::from_slice(&fs::read(kept.join("kernel.json")).ok()?).ok()
}

fn make(name: &str, debs: Vec<PathBuf>, cache: &Path, kept: &Path) -> Result<Record, BuildError> {
    fs::create_dir_all(cache).map_err(BuildError::io("creating", cache))?;
    let work = tempfile::tempdir_in(cache).map_err(BuildError::io("creating a folder in", cache))?;
    let debs = if debs.is_empty() {
        download(name, work.path())?
    } else {
        debs
    };
    let root = work.path().join("root");
    for deb in &debs {
        run("dpkg", Command::new("dpkg").arg("-x").arg(deb).arg(&root))?;
    }
    let boot = root.join("boot");
    let image = find(&boot, "vmlinuz-").ok_or_else(|| BuildError::input(&boot, "the package has no boot/vmlinuz-*"))?;
    let release = image
        .file_name()
        .and_then(|name| name.to_str())
        .unwrap_or_default()
        .trim_start_matches("vmlinuz-")
        .to_owned();
    let vmlinux = bzimage::elf(&write::read(&image)?).map_err(|what| BuildError::input(&image, what))?;
    // Merged and unmerged /usr.
    let tree = [root.join("lib/modules"), root.join("usr/lib/modules")]
        .into_iter()
        .map(|folder| folder.join(&release))
        .find(|folder| folder.is_dir())
        .ok_or_else(|| BuildError::input(&root, format!("the package has no modules of {release}")))?;
    let modules = modules::collect(&tree)?;
    let folder = kept.join("modules");
    for module in &modules {
        write::if_changed(&folder.join(format!("{}.ko", module.name)), &module.bytes)?;
    }
    let order: String = modules.iter().map(|module| format!("{}.ko\n", module.name)).collect();
    write::if_changed(&folder.join("order"), order.as_bytes())?;
    write::if_changed(&kept.join("vmlinux"), &vmlinux)?;
    let record = Record {
        package: name.to_owned(),
        release,
        vmlinux_sha256: write::sha256(&vmlinux),
        modules: modules.into_iter().map(|module| module.name).collect(),
    };
    write::if_changed(&kept.join("kernel.json"), &json(&record))?;
    Ok(record)
}

fn copy(kept: &Path, out: &Path, record: &Record) -> Result<(), BuildError> {
    let files = record.modules.iter().map(|name| format!("modules/{name}.ko"));
    for file in files.chain(["modules/order".into(), "vmlinux".into(), "kernel.json".into()]) {
        write::if_changed(&out.join(&file), &write::read(&kept.join(&file))?)?;
    }
    Ok(())
}

/// The real kernel package behind the first meta package that this distribution has.
fn resolve() -> Result<String, BuildError> {
    for meta in META_PACKAGES {
        let output = Command::new("apt-cache")
            .args(["depends", "--no-recommends", "--no-suggests", meta])
            .output();
        let output = output.map_err(|error| BuildError::Program {
            program: "apt-cache",
            what: error.to_string(),
        })?;
        let text = String::from_utf8_lossy(&output.stdout);
        let image = text
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "))
            .find(|name| name.starts_with("linux-image-"));
        if let Some(image) = image {
            return Ok(image.to_owned());
        }
    }
    Err(BuildError::Program {
        program: "apt-cache",
        what: format!(
            "knows none of {}: run `sudo apt-get update`, or name a package file with --deb",
            META_PACKAGES.join(", ")
        ),
    })
}

/// Downloads the image package, and the modules package where there is one (Ubuntu keeps them apart).
fn download(image: &str, work: &Path) -> Result<Vec<PathBuf>, BuildError> {
    let modules = image.replacen("linux-image-", "linux-modules-", 1);
    let known = Command::new("apt-cache").args(["show", &modules]).output();
    let apart = known.is_ok_and(|output| output.status.success() && !output.stdout.is_empty());
    let mut command = Command::new("apt-get");
    command.current_dir(work).args(["download", "-q", image]);
    if apart {
        command.arg(&modules);
    }
    run("apt-get", &mut command)?;
    let debs: Vec<_> = fs::read_dir(work)
        .map_err(BuildError::io("reading", work))?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|ending| ending == "deb"))
        .collect();
    if debs.is_empty() {
        return Err(BuildError::Program {
            program: "apt-get",
            what: format!("downloaded nothing for {image}"),
        });
    }
    Ok(debs)
}

fn run(program: &'static str, command: &mut Command) -> Result<(), BuildError> {
    let output = command.output().map_err(|error| BuildError::Program {
        program,
        what: error.to_string(),
    })?;
    if output.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&output.stderr);
    let last: Vec<_> = words.lines().rev().take(3).collect();
    Err(BuildError::Program {
        program,
        what: format!(
            "{} ({})",
            last.into_iter().rev().collect::<Vec<_>>().join("; "),
            output.status
        ),
    })
}

fn find(folder: &Path, prefix: &str) -> Option<PathBuf> {
    let mut found: Vec<_> = fs::read_dir(folder)
        .ok()?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            path.file_name()
                .and_then(|name| name.to_str())
                .is_some_and(|name| name.starts_with(prefix))
        })
        .collect();
    found.sort();
    found.pop()
}

fn json(record: &Record) -> Vec<u8> {
    let mut bytes = serde_json::to_vec_pretty(record).expect("a record is JSON");
    bytes.push(b'\n');
    bytes
}
