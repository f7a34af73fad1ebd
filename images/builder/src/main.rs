//! `far-image`: the command around the builder.
#![forbid(unsafe_code)]

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand, ValueEnum};
use far_image::{initramfs, inspect, kernel, kit, oci::Builder, write_whole};

/// Builds what guests boot from, bit for bit the same from the same inputs.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Examples:\n  far-image kernel --out kit\n  far-image kit --init far-init --tiffany tiffany --out kit\n  far-image oci --file ./agent:/agent:0755 --entrypoint /agent --out agent.oci.tar"
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// A guest kernel from the distribution's own packages (no root, nothing is installed).
    Kernel {
        /// Folder that gets vmlinux, modules/ and kernel.json.
        #[arg(long)]
        out: PathBuf,
        /// Folder where versions are kept between runs [default: the out folder's `cache`].
        #[arg(long)]
        cache: Option<PathBuf>,
        /// Take these package files instead of downloading (on Ubuntu: image and modules).
        #[arg(long)]
        deb: Vec<PathBuf>,
    },
    /// The initramfs: an init and the kernel's modules.
    Initramfs {
        /// Static program that becomes /init.
        #[arg(long)]
        init: PathBuf,
        /// Folder with `order` and the modules it lists; without `order` there are none.
        #[arg(long)]
        modules: PathBuf,
        /// File to write.
        #[arg(long)]
        out: PathBuf,
    },
    /// The project's own guest image with tiffany.
    Guest {
        /// Static tiffany.
        #[arg(long)]
        tiffany: PathBuf,
        /// OCI archive to write.
        #[arg(long)]
        out: PathBuf,
    },
    /// Initramfs and guest image beside a kernel: everything a blade boots from.
    Kit {
        /// Static far-init.
        #[arg(long)]
        init: PathBuf,
        /// Static tiffany.
        #[arg(long)]
        tiffany: PathBuf,
        /// Folder that `far-image kernel` filled [default: the out folder].
        #[arg(long)]
        kernel_dir: Option<PathBuf>,
        /// Folder that gets vmlinux, initramfs.cpio, tiffany-vm.oci.tar and kit.json.
        #[arg(long)]
        out: PathBuf,
    },
    /// An OCI image archive from single files.
    Oci(OciArguments),
    /// What an OCI image archive holds; every digest is checked.
    Inspect {
        /// The archive.
        file: PathBuf,
        /// For people or for programs.
        #[arg(short, long, value_enum, default_value_t = Format::Text)]
        output: Format,
    },
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Format {
    Text,
    Json,
}

#[derive(Debug, Args)]
struct OciArguments {
    /// SOURCE:PATH-IN-IMAGE[:MODE], mode in octal [default mode: 0644].
    #[arg(long, required = true)]
    file: Vec<String>,
    /// PATH-IN-IMAGE[:MODE] of an empty folder, mode in octal [default mode: 0755].
    #[arg(long)]
    dir: Vec<String>,
    /// Program and leading arguments; repeat for more words.
    #[arg(long)]
    entrypoint: Vec<String>,
    /// Default arguments; repeat for more.
    #[arg(long, allow_hyphen_values = true)]
    cmd: Vec<String>,
    /// NAME=value; repeat for more.
    #[arg(long)]
    env: Vec<String>,
    /// Working folder of the program.
    #[arg(long)]
    working_dir: Option<String>,
    /// User of the program: name, uid, name:group or uid:gid.
    #[arg(long)]
    user: Option<String>,
    /// OCI archive to write.
    #[arg(long)]
    out: PathBuf,
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("far-image: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Kernel { out, cache, deb } => {
            let source = if deb.is_empty() {
                kernel::Source::Apt
            } else {
                kernel::Source::Debs(deb)
            };
            let record = kernel::build(&source, &cache.unwrap_or_else(|| out.join("cache")), &out)?;
            println!(
                "kernel {} ({}), {} modules",
                record.release,
                record.package,
                record.modules.len()
            );
            Ok(())
        }
        Command::Initramfs { init, modules, out } => put(&out, &initramfs::build(&init, &modules)?),
        Command::Guest { tiffany, out } => put(&out, &kit::guest_image(&tiffany)?),
        Command::Kit {
            init,
            tiffany,
            kernel_dir,
            out,
        } => Ok(kit::build(&init, &tiffany, kernel_dir.as_ref().unwrap_or(&out), &out)?),
        Command::Oci(arguments) => oci(arguments),
        Command::Inspect { file, output } => {
            let report = inspect::inspect(&file)?;
            match output {
                Format::Text => print!("{report}"),
                Format::Json => println!("{}", serde_json::to_string_pretty(&report)?),
            }
            Ok(())
        }
    }
}

fn oci(arguments: OciArguments) -> Result<()> {
    let mut image = Builder::new();
    for spec in &arguments.file {
        let (source, path, mode) = match spec.split(':').collect::<Vec<_>>()[..] {
            [source, path] => (source, path, 0o644),
            [source, path, mode] => (source, path, octal(mode).with_context(|| format!("--file {spec}"))?),
            _ => bail!("--file {spec}: expected SOURCE:PATH-IN-IMAGE[:MODE]"),
        };
        let bytes = fs::read(source).with_context(|| format!("--file {spec}: reading {source}"))?;
        image.file(path, mode, 0, bytes)?;
    }
    for spec in &arguments.dir {
        let (path, mode) = spec.split_once(':').unwrap_or((spec, "0755"));
        let mode = octal(mode).with_context(|| format!("--dir {spec}"))?;
        image.folder(path, mode, 0)?;
    }
    if let Some(bad) = arguments
        .env
        .iter()
        .find(|entry| entry.find('=').is_none_or(|at| at == 0))
    {
        bail!("--env {bad}: expected NAME=value");
    }
    image
        .entrypoint(arguments.entrypoint)
        .cmd(arguments.cmd)
        .env(arguments.env)
        .run_as(arguments.working_dir, arguments.user);
    put(&arguments.out, &image.build())
}

fn octal(mode: &str) -> Result<u32> {
    u32::from_str_radix(mode, 8)
        .ok()
        .filter(|mode| *mode <= 0o7777)
        .with_context(|| format!("mode {mode:?} is not an octal number up to 7777"))
}

fn put(path: &Path, bytes: &[u8]) -> Result<()> {
    Ok(write_whole(path, bytes)?)
}
