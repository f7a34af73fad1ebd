//! The doubles: a VMM that behaves, images that exist, a guest's init, and a blade that can be killed and started again.

use crate::{
    agent::{Blade, Limits},
    board::{Board, Entry},
    clock::Clock,
    host::{
        HostError, HostFacts, ImageFault, ImageSettings, Images, PrepareError, Prepared, ReadyImage, StoredImage,
        VmHost, VmPlan,
    },
    ledger::Ledger,
    logs::LogReader,
    names::{AttemptKey, VmId},
    outcome::VmmEnd,
    pulse::Pinged,
    record::{End, Phase, Record, Resources},
    spec::{
        Identity, Spec, check_identity, check_spec,
        tests::{wire_identity, wire_spec},
    },
    supervisor::{Room, Supervisor},
};
use far_proto::{
    frame::{self, Decoder},
    guest::{
        self, Exit, GuestMessage, Hello, HostMessage, Log, Ready, Stage, exit::How, guest_message::Kind, host_message,
    },
};
use futures::{FutureExt, future::BoxFuture};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    sync::{Notify, watch},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

/// Real things in these stories take milliseconds; a story that waits so long is broken.
pub(crate) const LONG: Duration = Duration::from_secs(3600 * 24 * 30);

#[derive(Debug)]
pub(crate) struct FakeHost {
    folder: PathBuf,
    vms: Mutex<BTreeMap<VmId, FakeVm>>,
}

#[derive(Debug)]
struct FakeVm {
    boots: u32,
    end: watch::Sender<Option<VmmEnd>>,
}

impl FakeHost {
    fn with<T>(&self, vm: &VmId, act: impl FnOnce(&mut FakeVm) -> T) -> T {
        let mut vms = self.vms.lock().unwrap();
        act(vms.entry(vm.clone()).or_insert_with(|| FakeVm {
            boots: 0,
            end: watch::channel(None).0,
        }))
    }

    /// The VMM ends by itself.
    pub(crate) fn end(&self, vm: &VmId, end: VmmEnd) {
        self.with(vm, |vm| {
            vm.end.send_if_modified(|now| {
                now.is_none() && {
                    *now = Some(end);
                    true
                }
            })
        });
    }

    pub(crate) fn boots(&self, vm: &VmId) -> u32 {
        self.with(vm, |vm| vm.boots)
    }

    pub(crate) fn is_dead(&self, vm: &VmId) -> bool {
        self.with(vm, |vm| vm.end.borrow().is_some())
    }
}

impl VmHost for FakeHost {
    fn facts(&self) -> HostFacts {
        HostFacts::default()
    }

    fn folder(&self, vm: &VmId) -> PathBuf {
        self.folder.join(vm.as_str())
    }

    fn prepare(&self, plan: &VmPlan) -> Result<Prepared, PrepareError> {
        fs::create_dir_all(self.folder(&plan.vm)).map_err(|error| HostError {
            message: error.to_string(),
        })?;
        let resources = Resources {
            vcpus: plan.vcpus,
            memory_mib: plan.memory_mib,
            ..Resources::default()
        };
        Ok(Prepared {
            resources,
            nic: None,
            notice: String::new(),
        })
    }

    fn boot<'a>(&'a self, vm: &'a VmId) -> BoxFuture<'a, Result<(), HostError>> {
        self.with(vm, |vm| vm.boots += 1);
        async { Ok(()) }.boxed()
    }

    fn ended(&self, vm: &VmId) -> BoxFuture<'static, VmmEnd> {
        let mut end = self.with(vm, |vm| vm.end.subscribe());
        let never_booted = self.boots(vm) == 0;
        async move {
            if never_booted {
                return VmmEnd::Vanished { blade_rebooted: false };
            }
            let end = end.wait_for(Option::is_some).await;
            end.ok().and_then(|end| end.clone()).unwrap_or(VmmEnd::Clean)
        }
        .boxed()
    }

    fn kill<'a>(&'a self, vm: &'a VmId) -> BoxFuture<'a, ()> {
        self.end(vm, VmmEnd::Clean);
        async {}.boxed()
    }

    fn ping(&self, vm: &VmId) -> BoxFuture<'static, Pinged> {
        let socket = self.folder(vm).join("v.sock");
        async move { far_vmm::vsock::ping(&socket).await.map_err(|error| error.to_string()) }.boxed()
    }

    fn cpu_us<'a>(&'a self, _: &'a VmId) -> BoxFuture<'a, u64> {
        async { 42 }.boxed()
    }

    fn release<'a>(&'a self, vm: &'a VmId) -> BoxFuture<'a, Result<(), HostError>> {
        self.end(vm, VmmEnd::Clean);
        let _ = fs::remove_dir_all(self.folder(vm));
        async { Ok(()) }.boxed()
    }

    fn leftovers(&self) -> Vec<VmId> {
        let entries = fs::read_dir(&self.folder).into_iter().flatten();
        entries
            .filter_map(|entry| VmId::parse(entry.ok()?.file_name().to_str()?))
            .collect()
    }
}

#[derive(Debug, Default)]
pub(crate) struct FakeImages {
    /// How often images without a name were removed.
    pub(crate) collections: AtomicU32,
}

impl Images for FakeImages {
    fn prepare(&self, reference: &str) -> Result<ReadyImage, ImageFault> {
        if reference.contains("unknown") {
            return Err(ImageFault::Unknown {
                reference: reference.to_owned(),
            });
        }
        Ok(ReadyImage {
            digest: "sha256:1".into(),
            rootfs: PathBuf::from("/r"),
            settings: ImageSettings::default(),
        })
    }

    fn has_files(&self, _: &ReadyImage, paths: &[String]) -> Option<Vec<bool>> {
        Some(paths.iter().map(|path| !path.contains("missing")).collect())
    }

    fn list(&self) -> Result<Vec<StoredImage>, ImageFault> {
        Ok(Vec::new())
    }

    fn load(&self, _: &str, _: &Path) -> Result<StoredImage, ImageFault> {
        Ok(StoredImage::default())
    }

    fn remove(&self, _: &str) -> Result<(), ImageFault> {
        Ok(())
    }

    fn collect(&self, _: &BTreeSet<String>) -> Result<(), ImageFault> {
        self.collections.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn incoming(&self) -> PathBuf {
        std::env::temp_dir()
    }
}

/// What survives a far-node: the disk and the VMs.
pub(crate) struct World {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) host: Arc<FakeHost>,
    pub(crate) images: Arc<FakeImages>,
    pub(crate) boot_id: String,
    pub(crate) log_max_bytes: u64,
}

/// One run of far-node.
pub(crate) struct Node {
    pub(crate) supervisor: Supervisor,
    pub(crate) blade: Arc<Blade>,
    task: JoinHandle<()>,
}

impl World {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("vm");
        fs::create_dir(&folder).unwrap();
        let host = Arc::new(FakeHost {
            folder,
            vms: Mutex::default(),
        });
        Self {
            dir,
            host,
            images: Arc::default(),
            boot_id: "boot-1".into(),
            log_max_bytes: 1 << 20,
        }
    }

    pub(crate) async fn start(&self) -> Node {
        let ledger = Ledger::open(&self.dir.path().join("ledger")).unwrap();
        let loaded = ledger.load().unwrap();
        let blade = Arc::new(Blade {
            clock: Clock::start(),
            ledger,
            board: Board::open(&self.dir.path().join("seq")).unwrap(),
            host: self.host.clone(),
            images: self.images.clone(),
            nics: Arc::new(crate::nics::Nics::none("no NICs in stories")),
            guests: crate::guests::Guests::default(),
            metrics: crate::metrics::Metrics::default(),
            limits: Limits {
                boot_timeout: Duration::from_secs(90),
                log_max_bytes: self.log_max_bytes,
                heartbeat: Duration::from_secs(5),
            },
            logs: self.dir.path().join("logs"),
            boot_id: self.boot_id.clone(),
            fence: crate::fence::Fence::open(self.dir.path(), &self.boot_id).unwrap(),
            images_changed: Notify::new(),
            shutdown: CancellationToken::new(),
        });
        let room = Room {
            cpu_millis: 4000,
            memory_mib: 4096,
            max_vms: 8,
        };
        let (supervisor, task) = Supervisor::start(blade.clone(), room, loaded).await;
        Node {
            supervisor,
            blade,
            task,
        }
    }

    pub(crate) fn socket(&self, vm: &VmId) -> PathBuf {
        self.host.folder(vm).join("v.sock_5000")
    }

    /// Output as stored, and bytes dropped on the way.
    pub(crate) fn output(&self, vm: &VmId) -> (Vec<u8>, u64) {
        let mut reader = LogReader::new(&self.dir.path().join("logs").join(vm.as_str()));
        let (mut output, mut dropped) = (Vec::new(), 0);
        loop {
            let records = reader.read().unwrap();
            if records.is_empty() {
                return (output, dropped);
            }
            for read in records {
                dropped += read.dropped_bytes;
                output.extend(read.record.data);
            }
        }
    }
}

pub(crate) fn identity(attempt: u32) -> Identity {
    check_identity(Some(wire_identity("uid-1", attempt))).unwrap()
}

pub(crate) fn spec() -> Spec {
    check_spec(Some(wire_spec())).unwrap()
}

pub(crate) fn vm() -> VmId {
    VmId::of(&key())
}

pub(crate) fn key() -> AttemptKey {
    identity(1).key
}

impl Node {
    pub(crate) async fn ensure(&self) -> Entry {
        self.supervisor.ensure(identity(1), spec()).await.unwrap()
    }

    /// Waits until the record fulfils a claim.
    pub(crate) async fn until(&self, claim: impl Fn(&Record) -> bool) -> Arc<Record> {
        self.until_of(&key(), claim).await
    }

    pub(crate) async fn until_of(&self, key: &AttemptKey, claim: impl Fn(&Record) -> bool) -> Arc<Record> {
        let watch = self.blade.board.watch(0);
        let mut live = watch.live;
        if let Some(entry) = watch
            .replay
            .iter()
            .find(|entry| entry.record.identity.key == *key && claim(&entry.record))
        {
            return entry.record.clone();
        }
        let wait = async {
            loop {
                let entry = live.recv().await.unwrap();
                if entry.record.identity.key == *key && claim(&entry.record) {
                    return entry.record;
                }
            }
        };
        tokio::time::timeout(LONG, wait)
            .await
            .expect("the record never got there")
    }

    pub(crate) async fn until_phase(&self, phase: Phase) -> Arc<Record> {
        self.until(move |record| record.phase == phase).await
    }

    pub(crate) async fn until_ended(&self) -> End {
        self.until_phase(Phase::Ended).await.end.clone().unwrap()
    }

    /// As kill -9: nothing gets the chance to tidy up.
    pub(crate) async fn kill(self) {
        self.task.abort();
        let _ = self.task.await;
    }

    /// As SIGTERM.
    pub(crate) async fn shut_down(self) {
        self.blade.shutdown.cancel();
        self.task.await.unwrap();
    }

    /// Waits until what is left of an ended VM is gone.
    pub(crate) async fn until_released(&self) {
        let folder = self.blade.host.folder(&vm());
        while folder.exists() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

/// A guest's init on one connection.
pub(crate) struct Guest {
    pub(crate) stream: UnixStream,
    decoder: Decoder,
}

impl Guest {
    pub(crate) async fn connect(socket: &Path) -> Self {
        let connect = async {
            loop {
                match UnixStream::connect(socket).await {
                    Ok(stream) => return stream,
                    Err(_) => tokio::time::sleep(Duration::from_millis(1)).await,
                }
            }
        };
        let stream = tokio::time::timeout(Duration::from_secs(60), connect)
            .await
            .expect("nobody listens");
        Self {
            stream,
            decoder: Decoder::new(),
        }
    }

    pub(crate) async fn dial(socket: &Path, nonce: u8, stage: Stage) -> Self {
        let mut guest = Self::connect(socket).await;
        guest.send(hello(nonce, stage)).await;
        guest
    }

    pub(crate) async fn hang_up(&mut self) {
        let _ = self.stream.shutdown().await;
    }

    pub(crate) async fn send(&mut self, kind: Kind) {
        let mut frame = Vec::new();
        frame::encode(&GuestMessage { kind: Some(kind) }, &mut frame);
        // A host that cut the connection is what some stories are about.
        let _ = self.stream.write_all(&frame).await;
    }

    /// The next message; `None` when the host closed.
    pub(crate) async fn receive(&mut self) -> Option<host_message::Kind> {
        loop {
            if let Some(message) = self.decoder.next::<HostMessage>().unwrap() {
                return message.kind;
            }
            let mut buffer = vec![0; 64 << 10];
            match self.stream.read(&mut buffer).await {
                Ok(0) | Err(_) => return None,
                Ok(length) => self.decoder.push(&buffer[..length]),
            }
        }
    }

    pub(crate) async fn welcome(&mut self) -> guest::Welcome {
        match self.receive().await {
            Some(host_message::Kind::Welcome(welcome)) => welcome,
            other => panic!("{other:?} instead of Welcome"),
        }
    }

    /// Receives Welcome, Config, files and Start; answers Ready.
    pub(crate) async fn start(&mut self) -> (guest::Config, Vec<Vec<u8>>) {
        self.welcome().await;
        self.start_after_welcome().await
    }

    /// The same where Welcome was received before.
    pub(crate) async fn start_after_welcome(&mut self) -> (guest::Config, Vec<Vec<u8>>) {
        let config = match self.receive().await {
            Some(host_message::Kind::Config(config)) => config,
            other => panic!("{other:?} instead of Config"),
        };
        let mut files = vec![Vec::new(); config.files.len()];
        loop {
            match self.receive().await {
                Some(host_message::Kind::FileChunk(chunk)) => files[chunk.file as usize].extend(chunk.data),
                Some(host_message::Kind::Start(_)) => break,
                other => panic!("{other:?} instead of FileChunk or Start"),
            }
        }
        self.send(Kind::Ready(Ready {
            pid: 2,
            ..Ready::default()
        }))
        .await;
        (config, files)
    }

    pub(crate) async fn log(&mut self, seq: u64, text: &str) {
        let data = text.as_bytes().to_vec().into();
        self.send(Kind::Log(Log {
            stream: 1,
            seq,
            data,
            time_unix_ns: seq,
        }))
        .await;
    }

    pub(crate) async fn exit(&mut self, code: u32, last_stdout_seq: u64) {
        self.send(exit(code, last_stdout_seq)).await;
    }

    /// Reads on until the exit report is acknowledged; false when the host closed before.
    pub(crate) async fn is_acknowledged(&mut self) -> bool {
        loop {
            match self.receive().await {
                Some(host_message::Kind::ExitAck(_)) => return true,
                Some(_) => {}
                None => return false,
            }
        }
    }
}

pub(crate) fn hello(nonce: u8, stage: Stage) -> Kind {
    Kind::Hello(Hello {
        lowest_generation: 1,
        highest_generation: 1,
        boot_nonce: vec![nonce; 16],
        init_version: "fake".into(),
        stage: stage.into(),
        boot_ns: 1,
    })
}

pub(crate) fn exit(code: u32, last_stdout_seq: u64) -> Kind {
    Kind::Exit(Exit {
        how: Some(How::Code(code)),
        last_stdout_seq,
        ..Exit::default()
    })
}
