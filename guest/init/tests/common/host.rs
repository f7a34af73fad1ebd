//! The host's side of channels: opens them, returns credit, and collects what came.

use super::{Blade, Connection, Event};
use anyhow::{Context, bail, ensure};
use far_proto::{
    frame::{self, CHANNEL_WINDOW},
    guest::{
        ChannelEnd, ChannelStream, Close, Credit, Data, Done, Exec, ExecResize, ExecSignal, Forward, Get, Opened, Put,
        TerminalSize, TransferEntry, TransferKind, guest_message::Kind as FromGuest, host_message::Kind as ToGuest,
    },
};
use std::collections::HashMap;

/// What came on one channel.
#[derive(Debug, Default)]
pub struct Heard {
    pub opened: Option<Opened>,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    /// Data of put, get and forward.
    pub plain: Vec<u8>,
    /// Streams whose end was told.
    pub over: Vec<ChannelStream>,
    /// Entries of a Get with their content.
    pub entries: Vec<(TransferEntry, Vec<u8>)>,
    /// What may still be sent.
    pub allowance: usize,
    /// Bytes that came and were not given back.
    pub unpaid: usize,
    pub end: Option<ChannelEnd>,
}

/// The channels of one connection.
pub struct Host<'a> {
    pub blade: &'a mut Blade,
    pub connection: &'a mut Connection,
    pub channels: HashMap<u32, Heard>,
    pub done: Vec<Done>,
    /// false: no credit is given back.
    pub pays: bool,
}

impl<'a> Host<'a> {
    pub fn new(blade: &'a mut Blade, connection: &'a mut Connection) -> Self {
        Self {
            blade,
            connection,
            channels: HashMap::new(),
            done: vec![],
            pays: true,
        }
    }

    pub fn open(&mut self, channel: u32, request: ToGuest) {
        let heard = Heard {
            allowance: CHANNEL_WINDOW,
            ..Heard::default()
        };
        assert!(self.channels.insert(channel, heard).is_none());
        self.send(request);
    }

    pub fn send(&mut self, message: ToGuest) {
        self.connection.send(message).unwrap();
    }

    pub fn exec(&mut self, channel: u32, argv: &[&str]) {
        self.open(channel, ToGuest::Exec(exec(channel, argv)));
    }

    pub fn get(&mut self, channel: u32, path: &str) -> &Heard {
        let path = path.into();
        self.open(channel, ToGuest::Get(Get { channel, path }));
        self.end(channel)
    }

    pub fn forward(&mut self, channel: u32, port: u16) {
        let port = port.into();
        self.open(channel, ToGuest::Forward(Forward { channel, port }));
    }

    /// Takes one event; `None`: the connection is over.
    pub fn step(&mut self) -> anyhow::Result<Option<Event>> {
        let Some(event) = self.blade.step(self.connection)? else {
            return Ok(None);
        };
        match &event {
            Event::Other(message) => self.take(message)?,
            Event::Ready | Event::Log | Event::Heartbeat | Event::Exit(_) => {}
        }
        Ok(Some(event))
    }

    fn channel(&mut self, id: u32) -> anyhow::Result<&mut Heard> {
        let heard = self.channels.get_mut(&id).context("a channel that was never opened")?;
        ensure!(heard.end.is_none(), "a message after ChannelEnd");
        Ok(heard)
    }

    fn take(&mut self, message: &FromGuest) -> anyhow::Result<()> {
        match message {
            FromGuest::Opened(opened) => {
                ensure!(self.channel(opened.channel)?.opened.replace(*opened).is_none());
            }
            FromGuest::Data(data) => {
                let heard = self.channel(data.channel)?;
                match data.stream() {
                    ChannelStream::Stdout => heard.stdout.extend(&data.data),
                    ChannelStream::Stderr => heard.stderr.extend(&data.data),
                    ChannelStream::Unspecified => match heard.entries.last_mut() {
                        Some((_, content)) => content.extend(&data.data),
                        None => heard.plain.extend(&data.data),
                    },
                    ChannelStream::Stdin => bail!("stdin from the guest"),
                }
                if data.last {
                    heard.over.push(data.stream());
                }
                self.pay(data.channel, data.stream(), data.data.len())?;
            }
            FromGuest::TransferEntry(entry) => {
                self.channel(entry.channel)?.entries.push((entry.clone(), vec![]));
                self.pay(entry.channel, ChannelStream::Unspecified, frame::length_of(entry))?;
            }
            FromGuest::Credit(credit) => self.channel(credit.channel)?.allowance += credit.bytes as usize,
            FromGuest::ChannelEnd(end) => {
                let heard = self.channel(end.channel)?;
                heard.end = Some(end.clone());
            }
            FromGuest::Done(done) => self.done.push(done.clone()),
            other => bail!("unexpected {other:?}"),
        }
        Ok(())
    }

    fn pay(&mut self, channel: u32, stream: ChannelStream, bytes: usize) -> anyhow::Result<()> {
        let pays = self.pays;
        let heard = self.channel(channel)?;
        heard.unpaid += bytes;
        if !pays {
            // Two streams at most.
            ensure!(heard.unpaid <= 2 * CHANNEL_WINDOW, "more than there was credit for");
        } else if heard.unpaid > 0 {
            let bytes = std::mem::take(&mut heard.unpaid) as u32;
            let stream = stream.into();
            let _ = self.connection.send(ToGuest::Credit(Credit { channel, stream, bytes }));
        }
        Ok(())
    }

    /// What each channel has brought so far: bytes and ends, not contents.
    fn summary(&self) -> String {
        let one = |(id, heard): (&u32, &Heard)| {
            let (opened, end) = (heard.opened.is_some(), heard.end.as_ref().map(|end| format!("{end:?}")));
            format!(
                "{id}: opened {opened}, stdout {}, stderr {}, end {end:?}",
                heard.stdout.len(),
                heard.stderr.len()
            )
        };
        self.channels.iter().map(one).collect::<Vec<_>>().join("; ")
    }

    /// Goes on until `is_so`.
    pub fn until(&mut self, what: &str, is_so: impl Fn(&Self) -> bool) {
        while !is_so(self) {
            let event = self
                .step()
                .unwrap_or_else(|error| panic!("{what}: {error:#}; {}", self.summary()));
            assert!(event.is_some(), "{what}: the guest went away");
        }
    }

    /// Goes on until the channel is over.
    pub fn end(&mut self, channel: u32) -> &Heard {
        self.until("the end of a channel", |host| host.channels[&channel].end.is_some());
        &self.channels[&channel]
    }

    /// Sends bytes as credit allows.
    pub fn write(&mut self, channel: u32, stream: ChannelStream, mut bytes: &[u8], last: bool) {
        loop {
            self.until("credit", |host| {
                let heard = &host.channels[&channel];
                heard.allowance > 0 || bytes.is_empty() || heard.end.is_some()
            });
            let heard = self.channels.get_mut(&channel).unwrap();
            if heard.end.is_some() {
                return;
            }
            let (now, later) = bytes.split_at(bytes.len().min(heard.allowance));
            heard.allowance -= now.len();
            bytes = later;
            self.send(ToGuest::Data(Data {
                channel,
                stream: stream.into(),
                data: now.into(),
                last: last && bytes.is_empty(),
            }));
            if bytes.is_empty() {
                return;
            }
        }
    }

    pub fn type_in(&mut self, channel: u32, text: &str) {
        self.write(channel, ChannelStream::Stdin, text.as_bytes(), false);
    }

    pub fn close(&mut self, channel: u32) {
        self.send(ToGuest::Close(Close { channel }));
    }

    pub fn signal(&mut self, channel: u32, number: u32) {
        self.send(ToGuest::ExecSignal(ExecSignal { channel, number }));
    }

    pub fn resize(&mut self, channel: u32, rows: u32, columns: u32) {
        let size = Some(TerminalSize { rows, columns });
        self.send(ToGuest::ExecResize(ExecResize { channel, size }));
    }

    pub fn put(&mut self, channel: u32, path: &str, name_in_folder: &str) {
        let (path, name_in_folder) = (path.into(), name_in_folder.into());
        self.open(
            channel,
            ToGuest::Put(Put {
                channel,
                path,
                name_in_folder,
            }),
        );
    }

    pub fn entry(&mut self, channel: u32, kind: TransferKind, path: &str, mode: u32, content: &[u8]) {
        let entry = TransferEntry {
            channel,
            kind: kind.into(),
            path: path.into(),
            mode,
            size: content.len() as u64,
            target: if kind == TransferKind::Symlink {
                String::from_utf8(content.to_vec()).unwrap()
            } else {
                String::new()
            },
            modified_unix_s: 1_700_000_000,
        };
        let cost = frame::length_of(&entry);
        self.until("credit for an entry", |host| {
            let heard = &host.channels[&channel];
            heard.allowance >= cost || heard.end.is_some()
        });
        let heard = self.channels.get_mut(&channel).unwrap();
        if heard.end.is_some() {
            return;
        }
        heard.allowance -= cost;
        self.send(ToGuest::TransferEntry(entry));
        if kind == TransferKind::File {
            self.write(channel, ChannelStream::Unspecified, content, true);
        }
    }

    /// The answer to a request about the machine.
    pub fn answer(&mut self, id: u64) -> String {
        self.until("an answer", |host| host.done.iter().any(|done| done.id == id));
        self.done.iter().find(|done| done.id == id).unwrap().error.clone()
    }
}

pub fn exec(channel: u32, argv: &[&str]) -> Exec {
    Exec {
        channel,
        argv: argv.iter().map(ToString::to_string).collect(),
        ..Exec::default()
    }
}
