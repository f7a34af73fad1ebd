//! A small fuzzer: `far-fuzz TARGET [--seconds N]` mutates the corpus and keeps what reaches new code; `far-fuzz --list`
//! names the targets. A crash leaves its input in `fuzz/found/` and ends with code 1. Tests replay the corpus.
//!
//! Own driver instead of libFuzzer: a fresh machine needs neither a nightly compiler nor C++.
#![deny(unsafe_code)]

mod coverage;
mod mutate;
mod targets;

use mutate::Mutator;
use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use targets::{TARGETS, Target};

/// One input may take this long. Generous: the machine may be busy.
const HANG: Duration = Duration::from_secs(30);
/// Longest input, bytes.
const MAX_INPUT: usize = 1 << 16;
/// Most inputs kept in memory.
const MAX_POOL: usize = 20_000;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments == ["--list"] {
        TARGETS.iter().for_each(|(name, _)| println!("{name}"));
        return ExitCode::SUCCESS;
    }
    let seconds = match arguments.get(1..) {
        Some([]) => Some(20),
        Some([option, seconds]) if option == "--seconds" => seconds.parse().ok(),
        _ => None,
    };
    let target = arguments
        .first()
        .and_then(|name| TARGETS.iter().find(|(n, _)| n == name));
    let (Some(target), Some(seconds)) = (target, seconds) else {
        eprintln!("usage: far-fuzz TARGET [--seconds N] | --list");
        return ExitCode::from(2);
    };
    fuzz(*target, Duration::from_secs(seconds));
    ExitCode::SUCCESS
}

/// The committed inputs of a target, in order of their names.
fn corpus(name: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    paths.iter().filter_map(|path| fs::read(path).ok()).collect()
}

/// Mutates until the time is over. Ends the process when an input panics or hangs.
fn fuzz((name, run): Target, time: Duration) {
    let mut pool = corpus(name);
    let seeds = pool.len();
    pool.push(Vec::new());
    // A fixed start makes a failure repeatable on the same build; the corpus grows with what was found.
    let mut mutator = Mutator::new(0x5eed);
    let current: Arc<Mutex<(Vec<u8>, Instant)>> = Arc::new(Mutex::new((Vec::new(), Instant::now())));
    let keep = |name: &'static str, current: &Mutex<(Vec<u8>, Instant)>| {
        let input = current.lock().map(|guard| guard.0.clone()).unwrap_or_default();
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("found").join(name);
        let _ = fs::create_dir_all(path.parent().unwrap_or(&path)).and_then(|()| fs::write(&path, &input));
        eprintln!("far-fuzz {name}: {} bytes kept in {}", input.len(), path.display());
    };
    let (watched, message) = (Arc::clone(&current), std::panic::take_hook());
    std::panic::set_hook(Box::new(move |panic| {
        message(panic);
        keep(name, &watched);
        std::process::exit(1);
    }));
    let watched = Arc::clone(&current);
    std::thread::spawn(move || {
        loop {
            // The watchman's round; nothing waits for it.
            std::thread::park_timeout(Duration::from_secs(1));
            let since = watched.lock().map(|guard| guard.1.elapsed()).unwrap_or_default();
            if since > HANG {
                eprintln!("far-fuzz {name}: one input took more than {} s", HANG.as_secs());
                keep(name, &watched);
                std::process::exit(1);
            }
        }
    });
    let (mut seen, mut runs) = (Vec::new(), 0_u64);
    let mut try_one = |input: &[u8], seen: &mut Vec<u8>| {
        if let Ok(mut guard) = current.lock() {
            guard.0.clear();
            guard.0.extend_from_slice(input);
            guard.1 = Instant::now();
        }
        runs += 1;
        coverage::reset();
        run(input);
        coverage::note(seen)
    };
    for input in &pool {
        try_one(input, &mut seen);
    }
    let start = Instant::now();
    while start.elapsed() < time {
        let input = mutator.next(&pool, MAX_INPUT);
        if try_one(&input, &mut seen) && pool.len() < MAX_POOL {
            pool.push(input);
        }
    }
    let reached = seen.iter().filter(|&&bits| bits != 0).count();
    println!(
        "far-fuzz {name}: {runs} inputs in {} s from {seeds} seeds, {} kept, {}",
        time.as_secs(),
        pool.len() - seeds - 1,
        if coverage::is_on() {
            format!("{reached} of {} edges", seen.len())
        } else {
            "without coverage".into()
        }
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_has_a_corpus_and_survives_it_cut_at_every_byte() {
        for (name, run) in TARGETS {
            let inputs = corpus(name);
            assert!(inputs.len() >= 3, "{name} has {} seeds", inputs.len());
            for input in inputs {
                for end in 0..=input.len().min(4096) {
                    run(&input[..end]);
                }
                run(&input);
            }
        }
    }

    #[test]
    fn a_thousand_mutations_of_each_target_do_no_harm() {
        for (name, run) in TARGETS {
            let (pool, mut mutator) = (corpus(name), Mutator::new(1));
            (0..1000).for_each(|_| run(&mutator.next(&pool, 4096)));
        }
    }
}
