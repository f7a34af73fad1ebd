//! Firecracker, which is given the description as it is.

use super::Program;
use std::path::Path;

/// What far-vmm was asked for that Firecracker understands itself.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Options<'a> {
    /// `--id`: 1 to 64 of `[A-Za-z0-9-]`.
    pub vm_id: &'a str,
    /// `--metadata`.
    pub metadata: Option<&'a Path>,
    /// `--boot-timer`.
    pub boot_timer: bool,
    /// `--api-sock`; absent: `--no-api`.
    pub api_sock: Option<&'a Path>,
}

/// The command line.
#[must_use]
pub fn program(firecracker: &Path, config_file: &Path, options: &Options) -> Program {
    let mut args = vec![
        "--id".into(),
        options.vm_id.into(),
        "--config-file".into(),
        config_file.into(),
    ];
    if let Some(metadata) = options.metadata {
        args.extend(["--metadata".into(), metadata.into()]);
    }
    if options.boot_timer {
        args.push("--boot-timer".into());
    }
    match options.api_sock {
        Some(socket) => args.extend(["--api-sock".into(), socket.into()]),
        None => args.push("--no-api".into()),
    }
    Program {
        path: firecracker.to_owned(),
        args,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_file_is_given_to_firecracker() {
        let base = Options {
            vm_id: "fa-1",
            ..Options::default()
        };
        let cases = [
            (
                "as far-node starts it",
                base.clone(),
                "--id fa-1 --config-file /r/vm.json --no-api",
            ),
            (
                "as Flintlock starts it",
                Options {
                    metadata: Some(Path::new("/r/metadata.json")),
                    boot_timer: true,
                    ..base.clone()
                },
                "--id fa-1 --config-file /r/vm.json --metadata /r/metadata.json --boot-timer --no-api",
            ),
            (
                "with an API",
                Options {
                    api_sock: Some(Path::new("/r/api.sock")),
                    ..base
                },
                "--id fa-1 --config-file /r/vm.json --api-sock /r/api.sock",
            ),
        ];
        for (why, options, expected) in cases {
            let program = program(Path::new("/bin/firecracker"), Path::new("/r/vm.json"), &options);
            let args: Vec<_> = program.args.iter().map(|arg| arg.to_str().unwrap()).collect();
            assert_eq!(args.join(" "), expected, "{why}");
        }
    }
}
