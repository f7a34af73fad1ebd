//! A blade in the test's own process, behind the same socket as the real one: it knows images and the output of agents.

use std::{
    path::Path,
    pin::Pin,
    sync::{Arc, Mutex},
};

use far_proto::node::{
    AgentState, CapacityRequest, ClaimAgentRequest, EnsureAgentRequest, Event, ForgetAgentRequest, ForgetAgentResponse,
    Image, ListAgentsRequest, ListAgentsResponse, ListImagesRequest, ListImagesResponse, LoadImageRequest, LogChunk,
    LogsRequest, NodeCapacity, RemoveImageRequest, RemoveImageResponse, ResurrectAgentRequest, SleepAgentRequest,
    StopAgentRequest, Stream as OutputStream, WatchEventsRequest,
    node_server::{Node, NodeServer},
};
use futures::Stream;
use tokio::net::UnixListener;
use tonic::{Request, Response, Status, Streaming};

#[derive(Default)]
struct State {
    images: Vec<Image>,
    loaded_bytes: Vec<u8>,
    requests: Vec<LogsRequest>,
    output: Vec<(OutputStream, String)>,
    /// Keeps the output's stream open, as a running agent does.
    is_running: bool,
    agents: Vec<AgentState>,
}

/// Handle of the test.
#[derive(Clone, Default)]
pub(crate) struct Blade(Arc<Mutex<State>>);

impl Blade {
    /// Serves on `<run>/node.sock` until the test's runtime ends.
    pub(crate) fn serve(run: &Path) -> Self {
        std::fs::create_dir_all(run).unwrap();
        let blade = Self::default();
        let listener = UnixListener::bind(run.join("node.sock")).unwrap();
        let incoming = futures::stream::unfold(listener, |listener| async move {
            let accepted = listener.accept().await.map(|(stream, _)| stream);
            Some((accepted, listener))
        });
        let service = NodeServer::new(blade.clone());
        tokio::spawn(
            tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(incoming),
        );
        blade
    }

    pub(crate) fn says(&self, stream: OutputStream, text: &str) {
        self.0.lock().unwrap().output.push((stream, text.to_owned()));
    }

    pub(crate) fn keeps_running(&self) {
        self.0.lock().unwrap().is_running = true;
    }

    /// Lists a live agent, and never answers when it is to be stopped.
    pub(crate) fn has_an_agent_that_cannot_be_stopped(&self) {
        self.0.lock().unwrap().agents.push(AgentState::default());
    }

    pub(crate) fn loaded_bytes(&self) -> Vec<u8> {
        self.0.lock().unwrap().loaded_bytes.clone()
    }

    pub(crate) fn log_requests(&self) -> Vec<LogsRequest> {
        self.0.lock().unwrap().requests.clone()
    }
}

type Chunks = Pin<Box<dyn Stream<Item = Result<LogChunk, Status>> + Send>>;
type Events = Pin<Box<dyn Stream<Item = Result<Event, Status>> + Send>>;

fn not_here<T>() -> Result<Response<T>, Status> {
    Err(Status::unimplemented("not on the test's blade"))
}

#[tonic::async_trait]
impl Node for Blade {
    type WatchEventsStream = Events;
    type LogsStream = Chunks;

    async fn logs(&self, request: Request<LogsRequest>) -> Result<Response<Chunks>, Status> {
        let request = request.into_inner();
        let mut state = self.0.lock().unwrap();
        state.requests.push(request.clone());
        if state.output.is_empty() {
            return Err(Status::not_found("no such attempt on this blade"));
        }
        let chunks: Vec<_> = state
            .output
            .iter()
            .filter(|(stream, _)| request.stream() == OutputStream::Unspecified || request.stream() == *stream)
            .map(|(stream, text)| {
                Ok(LogChunk {
                    stream: (*stream).into(),
                    time: Some(prost_types::Timestamp { seconds: 0, nanos: 0 }),
                    data: text.clone().into_bytes(),
                    ..LogChunk::default()
                })
            })
            .collect();
        let chunks = futures::stream::iter(chunks);
        Ok(Response::new(if state.is_running {
            Box::pin(futures::StreamExt::chain(chunks, futures::stream::pending()))
        } else {
            Box::pin(chunks)
        }))
    }

    async fn load_image(&self, request: Request<Streaming<LoadImageRequest>>) -> Result<Response<Image>, Status> {
        let mut messages = request.into_inner();
        let (mut reference, mut bytes) = (String::new(), Vec::new());
        while let Some(message) = messages.message().await? {
            if reference.is_empty() {
                reference.clone_from(&message.reference);
            } else if !message.reference.is_empty() {
                return Err(Status::invalid_argument("reference: in the first message only"));
            }
            bytes.extend_from_slice(&message.data);
        }
        if bytes.starts_with(b"broken") {
            return Err(Status::invalid_argument(
                "the archive is no OCI layout: index.json is missing",
            ));
        }
        let image = Image {
            digest: "sha256:00112233".into(),
            references: vec![reference],
            size_bytes: bytes.len() as u64,
        };
        let mut state = self.0.lock().unwrap();
        state.images.push(image.clone());
        state.loaded_bytes = bytes;
        Ok(Response::new(image))
    }

    async fn list_images(&self, _: Request<ListImagesRequest>) -> Result<Response<ListImagesResponse>, Status> {
        let images = self.0.lock().unwrap().images.clone();
        Ok(Response::new(ListImagesResponse { images }))
    }

    async fn remove_image(
        &self,
        request: Request<RemoveImageRequest>,
    ) -> Result<Response<RemoveImageResponse>, Status> {
        let reference = request.into_inner().reference;
        let mut state = self.0.lock().unwrap();
        let before = state.images.len();
        state.images.retain(|image| !image.references.contains(&reference));
        if state.images.len() == before {
            return Err(Status::not_found(format!("no image {reference}")));
        }
        Ok(Response::new(RemoveImageResponse {}))
    }

    async fn claim_agent(&self, _: Request<ClaimAgentRequest>) -> Result<Response<AgentState>, Status> {
        Err(Status::unimplemented("not told by this test"))
    }
    async fn ensure_agent(&self, _: Request<EnsureAgentRequest>) -> Result<Response<AgentState>, Status> {
        not_here()
    }
    async fn stop_agent(&self, _: Request<StopAgentRequest>) -> Result<Response<AgentState>, Status> {
        std::future::pending().await
    }
    async fn sleep_agent(&self, _: Request<SleepAgentRequest>) -> Result<Response<AgentState>, Status> {
        not_here()
    }
    async fn resurrect_agent(&self, _: Request<ResurrectAgentRequest>) -> Result<Response<AgentState>, Status> {
        not_here()
    }
    async fn forget_agent(&self, _: Request<ForgetAgentRequest>) -> Result<Response<ForgetAgentResponse>, Status> {
        not_here()
    }
    async fn list_agents(&self, _: Request<ListAgentsRequest>) -> Result<Response<ListAgentsResponse>, Status> {
        let agents = self.0.lock().unwrap().agents.clone();
        Ok(Response::new(ListAgentsResponse {
            agents,
            ..ListAgentsResponse::default()
        }))
    }
    async fn watch_events(&self, _: Request<WatchEventsRequest>) -> Result<Response<Events>, Status> {
        not_here()
    }
    async fn capacity(&self, _: Request<CapacityRequest>) -> Result<Response<NodeCapacity>, Status> {
        not_here()
    }
}
