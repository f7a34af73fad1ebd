//! `far image`: guest images of this machine's blade.

use std::{
    fs::File,
    io::{IsTerminal, Read},
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, bail};
use far_proto::node::{ListImagesRequest, LoadImageRequest, RemoveImageRequest};
use serde_json::json;

use crate::{
    args::ImageCommand,
    exit::{self, Outcome},
    folders::Folders,
    node::{self, NodeError},
    output,
    table::aligned,
};

/// Size of one message: well below gRPC's 4 MiB, large enough that messages cost nothing.
const CHUNK_BYTES: usize = 256 << 10;
/// Messages read ahead of the node agent.
const AHEAD: usize = 4;

pub(crate) async fn image(folders: &Folders, command: &ImageCommand) -> anyhow::Result<Outcome> {
    match command {
        ImageCommand::Load { file, reference } => load(folders, file, reference).await,
        ImageCommand::Ls(args) => list(folders, args.output.is_some()).await,
        ImageCommand::Rm { reference } => {
            node::connect(&folders.node_socket())
                .await?
                .remove_image(RemoveImageRequest {
                    reference: reference.clone(),
                })
                .await
                .map_err(NodeError::of(format!("removing image {reference}")))?;
            output::line(&format!("removed {reference}"));
            Ok(Outcome::Success)
        }
    }
}

async fn load(folders: &Folders, file: &Path, reference: &str) -> anyhow::Result<Outcome> {
    let archive = File::open(file).with_context(|| format!("opening {}", file.display()))?;
    let metadata = archive
        .metadata()
        .with_context(|| format!("reading {}", file.display()))?;
    if metadata.is_dir() {
        bail!("{} is a folder: pack the OCI layout with tar first", file.display());
    }
    let total = metadata.len();
    let mut client = node::connect(&folders.node_socket()).await?;

    let sent = Arc::new(AtomicU64::new(0));
    let read_error = Arc::new(Mutex::new(None));
    let (messages, stream) = tokio::sync::mpsc::channel(AHEAD);
    let reader = {
        let (sent, read_error, reference) = (sent.clone(), read_error.clone(), reference.to_owned());
        // Reading a file blocks; the channel's bound keeps it from running ahead.
        tokio::task::spawn_blocking(move || {
            if let Err(error) = send_chunks(archive, reference, &messages, &sent) {
                *read_error.lock().expect("nobody panics with the lock") = Some(error);
            }
        })
    };
    let stream = futures::stream::unfold(stream, |mut stream| async move {
        let message = stream.recv().await?;
        Some((message, stream))
    });
    let call = client.load_image(stream);
    let answer = with_progress(call, &sent, total).await;
    reader.await.context("reading the archive")?;
    if let Some(error) = read_error.lock().expect("nobody panics with the lock").take() {
        return Err(error).with_context(|| format!("reading {}", file.display()));
    }
    let image = answer
        .map_err(NodeError::of(format!("loading {}", file.display())))?
        .into_inner();
    output::line(&format!("loaded {reference} ({})", image.digest));
    Ok(Outcome::Success)
}

/// Reads the archive into messages until it ends or the receiver is gone (the call failed; its status says why).
fn send_chunks(
    mut archive: File,
    reference: String,
    messages: &tokio::sync::mpsc::Sender<LoadImageRequest>,
    sent: &AtomicU64,
) -> std::io::Result<()> {
    let mut reference = Some(reference);
    loop {
        let mut data = Vec::with_capacity(CHUNK_BYTES);
        let count = Read::by_ref(&mut archive)
            .take(CHUNK_BYTES as u64)
            .read_to_end(&mut data)?;
        if count == 0 && reference.is_none() {
            return Ok(());
        }
        let message = LoadImageRequest {
            reference: reference.take().unwrap_or_default(),
            data,
        };
        if messages.blocking_send(message).is_err() {
            return Ok(());
        }
        sent.fetch_add(count as u64, Ordering::Relaxed);
    }
}

/// On a terminal: how much was sent, then that the blade unpacks.
async fn with_progress<T>(call: impl Future<Output = T>, sent: &AtomicU64, total: u64) -> T {
    if !std::io::stderr().is_terminal() {
        return call.await;
    }
    tokio::pin!(call);
    let mut tick = tokio::time::interval(Duration::from_millis(200));
    loop {
        tokio::select! {
            answer = &mut call => {
                output::error_bytes(b"\r\x1b[K");
                return answer;
            }
            _ = tick.tick() => {
                let sent = sent.load(Ordering::Relaxed);
                let text = if sent >= total {
                    "\r\x1b[Kunpacking …".to_owned()
                } else {
                    format!("\r\x1b[K{} of {} MiB", sent >> 20, total.div_ceil(1 << 20))
                };
                output::error_bytes(text.as_bytes());
            }
        }
    }
}

async fn list(folders: &Folders, as_json: bool) -> anyhow::Result<Outcome> {
    let images = node::connect(&folders.node_socket())
        .await?
        .list_images(ListImagesRequest {})
        .await
        .map_err(NodeError::of("listing images"))?
        .into_inner()
        .images;
    if as_json {
        let images: Vec<_> = images
            .iter()
            .map(|image| json!({"digest": image.digest, "references": image.references, "sizeBytes": image.size_bytes}))
            .collect();
        output::line(&serde_json::to_string_pretty(&images)?);
        return Ok(Outcome::Success);
    }
    let mut rows = vec![["REFERENCE", "DIGEST", "SIZE"].map(str::to_owned).to_vec()];
    for image in &images {
        let references = if image.references.is_empty() {
            vec!["<none>".to_owned()]
        } else {
            image.references.clone()
        };
        for reference in references {
            let digest: String = image.digest.chars().take(19).collect();
            rows.push(vec![
                reference,
                digest,
                format!("{} KiB", image.size_bytes.div_ceil(1024)),
            ]);
        }
    }
    if images.is_empty() {
        output::note("No images. Load one with `far image load FILE --as REF`.");
    } else {
        aligned(&rows).iter().for_each(|line| output::line(line));
    }
    Ok(exit::Outcome::Success)
}
