//! One connection: takes what requests are there, does them in runs, answers in order.
//!
//! Neighbouring reads share a read transaction, neighbouring writes a place in the writer's queue, so a
//! pipeline of a thousand writes waits for the disk once. A read after a write waits for it: a client sees what it
//! has written.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

use super::commands::{self, Action, Answer, Context, ReadCommand, Session, Step, store_error, write_error};
use super::memory::{Held, STEP, UsedUp};
use super::reply::{ITEM_BYTES, Reply, Version};
use super::request::{ARGUMENT_BYTES, Limits, RequestDecoder};
use crate::gate::{Access, Permits, Verdict};
use crate::store::WriteOp;

/// Space for what arrives next.
const READ_BYTES: usize = 64 << 10;
/// Replies are sent when there are so many bytes of them.
const WRITE_BYTES: usize = 256 << 10;
/// Commands in a run.
const RUN_COMMANDS: usize = 1024;
/// Writes in a run that answer with a value. Together they take no more than the largest reply to MGET.
const RUN_VALUES: usize = 8;
/// Values that are read before the replies are sent. A few bytes ask for a large value, so without it a pipeline would take any amount of
/// memory.
const READ_VALUES: usize = 4 << 20;

pub(super) struct Connection {
    stream: TcpStream,
    context: Arc<Context>,
    session: Session,
    limits: Limits,
    decoder: RequestDecoder,
    input: BytesMut,
    output: BytesMut,
    /// What is counted of `input`, and of requests that were taken out of it and are not done; of `output`, and of values on their way there.
    requests: Held,
    replies: Held,
    /// What the request takes that is looked at, and those of the run.
    current: usize,
    in_run: usize,
    /// The room of `input` is more than every connection has.
    is_large: bool,
    /// A reply was more than could be counted: the connection ends.
    used_up: bool,
    run: Run,
    stop: CancellationToken,
}

/// Commands that are done together.
enum Run {
    Empty,
    Reads { reads: Vec<(u16, ReadCommand)>, keys: usize, permits: Permits },
    Writes { ops: Vec<WriteOp>, answers: Vec<Answer>, values: usize, permits: Permits },
}

impl Run {
    fn is_full(&self) -> bool {
        match self {
            Self::Empty => false,
            Self::Reads { keys, .. } => *keys >= RUN_COMMANDS,
            Self::Writes { ops, values, .. } => ops.len() >= RUN_COMMANDS || *values >= RUN_VALUES,
        }
    }
}

/// Whether the connection goes on.
#[derive(PartialEq, Eq)]
enum Next {
    Continue,
    Close,
}

impl Connection {
    pub(super) fn new(
        stream: TcpStream,
        context: Arc<Context>,
        id: u64,
        limits: Limits,
        stop: CancellationToken,
    ) -> Self {
        let (requests, replies) = (context.memory.of(id), context.memory.of(id));
        Self {
            requests,
            replies,
            stream,
            context,
            session: Session { id, name: Bytes::new(), version: Version::Resp2 },
            limits,
            decoder: RequestDecoder::new(limits),
            input: BytesMut::new(),
            output: BytesMut::new(),
            current: 0,
            in_run: 0,
            is_large: false,
            used_up: false,
            run: Run::Empty,
            stop,
        }
    }

    /// Serves until the client closes, breaks the protocol or says QUIT, or the server stops: then what was
    /// begun is answered first.
    pub(super) async fn serve(mut self) -> io::Result<()> {
        loop {
            let next = self.take_requests().await?;
            self.finish_run().await?;
            self.send().await?;
            if next == Next::Close || self.used_up {
                return self.stream.shutdown().await;
            }
            if self.output.capacity() > STEP {
                // Nor the room of large replies: it is counted no more.
                self.output = BytesMut::new();
            }
            if self.is_large && self.input.len() < READ_BYTES {
                // The room that large requests took is not kept for the connection's life.
                self.input = BytesMut::from(&self.input[..]);
                self.is_large = false;
            }
            // Of a request that is not all there, as long as its client leaves it so.
            if let Err(error) = self.requests.set(self.held()) {
                return self.refuse(error).await;
            }
            self.input.reserve(READ_BYTES);
            let read = tokio::select! {
                biased;
                () = self.stop.cancelled() => return Ok(()),
                read = self.stream.read_buf(&mut self.input) => read?,
            };
            if read == 0 {
                return Ok(());
            }
            self.is_large |= self.input.len() > STEP;
            // Also what is in it of requests that are whole: until they are done.
            if let Err(error) = self.requests.set(self.held()) {
                return self.refuse(error).await;
            }
        }
    }

    /// What requests take.
    fn held(&self) -> usize {
        self.input.len() + self.decoder.held_bytes() + self.current + self.in_run
    }

    async fn refuse(mut self, error: UsedUp) -> io::Result<()> {
        self.reply(Reply::error(format!("ERR {error}")));
        self.send().await?;
        self.stream.shutdown().await
    }

    /// Does all requests that have arrived.
    async fn take_requests(&mut self) -> io::Result<Next> {
        loop {
            let before = self.input.len();
            match self.decoder.decode(&mut self.input) {
                Ok(None) => return Ok(Next::Continue),
                Ok(Some(arguments)) => {
                    self.context.commands.fetch_add(1, Ordering::Relaxed);
                    self.current = before - self.input.len() + arguments.len() * ARGUMENT_BYTES;
                    if let Err(error) = self.requests.grow(self.held()) {
                        drop(arguments);
                        self.finish_run().await?;
                        self.reply(Reply::error(format!("ERR {error}")));
                        return Ok(Next::Close);
                    }
                    let action = commands::parse(&self.context, &mut self.session, arguments);
                    let next = self.take(action).await?;
                    self.current = 0;
                    if next == Next::Close || self.used_up {
                        return Ok(Next::Close);
                    }
                }
                Err(error) => {
                    self.finish_run().await?;
                    self.reply(Reply::error(format!("ERR {error}")));
                    return Ok(Next::Close);
                }
            }
        }
    }

    async fn take(&mut self, action: Action) -> io::Result<Next> {
        match action {
            Action::Reply(reply) => {
                self.finish_run().await?;
                self.reply(reply);
                self.current = 0;
                self.send_if_full().await?;
            }
            Action::Close(reply) => {
                self.finish_run().await?;
                self.reply(reply);
                return Ok(Next::Close);
            }
            Action::Scan(scan) => {
                self.finish_run().await?;
                let reply = loop {
                    match scan.step(&self.context).await {
                        Ok(Step::Done(reply)) => break reply,
                        Ok(Step::Held(slot)) => {
                            self.send().await?;
                            if let Some(reply) = self.wait(slot, Access::Read).await? {
                                break reply;
                            }
                        }
                        Err(error) => break store_error(&error),
                    }
                };
                self.reply(reply);
                self.send_if_full().await?;
            }
            Action::Split(command) => {
                self.finish_run().await?;
                let reply = command.run(&self.context).await;
                self.reply(reply);
            }
            Action::Read { slot, read } => {
                if self.enter(slot, Access::Read).await?
                    && let Run::Reads { reads, keys, .. } = &mut self.run
                {
                    *keys += read.keys();
                    reads.push((slot, read));
                    self.in_run += std::mem::take(&mut self.current);
                }
            }
            Action::Write { slot, op, answer } => {
                self.delay_write(slot).await?;
                if self.enter(slot, Access::Write).await?
                    && let Run::Writes { ops, answers, values, .. } = &mut self.run
                {
                    *values += usize::from(op.answers_value());
                    ops.push(op);
                    answers.push(answer);
                    self.in_run += std::mem::take(&mut self.current);
                }
            }
        }
        if self.run.is_full() {
            self.finish_run().await?;
        }
        Ok(Next::Continue)
    }

    /// Passes the gate, with a run of this kind begun. False if the command was answered instead.
    async fn enter(&mut self, slot: u16, access: Access) -> io::Result<bool> {
        loop {
            let verdict = match (&mut self.run, access) {
                (Run::Reads { permits, .. }, Access::Read) | (Run::Writes { permits, .. }, Access::Write) => {
                    permits.enter(slot)
                }
                _ => {
                    self.finish_run().await?;
                    let permits = self.context.node.gate().permits(access);
                    self.run = match access {
                        Access::Read => Run::Reads { reads: Vec::new(), keys: 0, permits },
                        Access::Write => {
                            Run::Writes { ops: Vec::new(), answers: Vec::new(), values: 0, permits }
                        }
                    };
                    continue;
                }
            };
            match verdict {
                Verdict::Pass => return Ok(true),
                Verdict::Moved | Verdict::Unowned | Verdict::Quarantined => {
                    self.finish_run().await?;
                    let reply = self.redirect(slot);
                    self.reply(reply);
                    return Ok(false);
                }
                Verdict::Held => {
                    // A hold waits for what was let in before: that must not wait for the hold.
                    self.finish_run().await?;
                    self.send().await?;
                    if let Some(reply) = self.wait(slot, access).await? {
                        self.reply(reply);
                        return Ok(false);
                    }
                }
            }
        }
    }

    /// Waits where writes to the slot are slowed, with nothing let in meanwhile.
    async fn delay_write(&mut self, slot: u16) -> io::Result<()> {
        if self.context.node.gate().is_slow(slot) {
            self.finish_run().await?;
            self.send().await?;
            tokio::select! {
                () = self.context.node.gate().delay_write(slot) => {}
                () = self.stop.cancelled() => {}
            }
        }
        Ok(())
    }

    /// Waits until the slot is not held. A reply says that it is of no use to wait.
    async fn wait(&mut self, slot: u16, access: Access) -> io::Result<Option<Reply>> {
        let gate = self.context.node.gate().clone();
        let waited = gate.wait(slot, access);
        tokio::pin!(waited);
        loop {
            // A client that went away must not have its write done later, over one that it sent by another connection.
            let len = self.input.len();
            let room = len < self.limits.request_bytes && self.requests.set(self.held()).is_ok();
            self.is_large |= len > STEP;
            self.input.reserve(if room { READ_BYTES } else { 0 });
            tokio::select! {
                waited = &mut waited => {
                    return Ok(waited.err().map(|error| Reply::error(format!("TRYAGAIN {error}; try again"))));
                }
                () = self.stop.cancelled() => {
                    return Ok(Some(Reply::error("TRYAGAIN the node is shutting down; nothing was done")));
                }
                read = self.stream.read_buf(&mut self.input), if room => {
                    if read? == 0 {
                        return Err(io::ErrorKind::ConnectionReset.into());
                    }
                }
            }
        }
    }

    fn redirect(&self, slot: u16) -> Reply {
        let node = &self.context.node;
        let ownership = node.gate().ownership();
        match ownership.of(slot).map(|claim| &claim.owner) {
            // Became this node's between the gate's answer and now.
            Some(owner) if owner == node.id() => {
                if let Some(why) = node.gate().quarantined(slot) {
                    return Reply::error(format!("CLUSTERDOWN slot {slot} is quarantined because of {why}"));
                }
                Reply::error("TRYAGAIN the slot changed hands this moment; try again")
            }
            Some(owner) => match node.addresses(owner) {
                Some(addresses) if !addresses.resp.is_empty() => {
                    Reply::error(format!("MOVED {slot} {}", addresses.resp))
                }
                _ => Reply::error(format!(
                    "CLUSTERDOWN the address of node {owner}, which owns slot {slot}, is not known"
                )),
            },
            None => Reply::error("CLUSTERDOWN Hash slot not served"),
        }
    }

    /// Does the run and adds its replies.
    async fn finish_run(&mut self) -> io::Result<()> {
        loop {
            let rest = self.do_run().await?;
            if rest.is_empty() {
                self.in_run = 0;
                return self.send_if_full().await;
            }
            // Through the gate again: a client that reads slowly must not keep a hold from draining.
            self.send().await?;
            for (slot, read) in rest {
                self.take_read(slot, read).await?;
            }
        }
    }

    /// Boxed, since it may end in [`Connection::finish_run`].
    fn take_read(
        &mut self,
        slot: u16,
        read: ReadCommand,
    ) -> Pin<Box<dyn Future<Output = io::Result<Next>> + Send + '_>> {
        Box::pin(self.take(Action::Read { slot, read }))
    }

    /// [`Connection::finish_run`] for as many reads as one may do before their replies are sent; returns the others.
    async fn do_run(&mut self) -> io::Result<Vec<(u16, ReadCommand)>> {
        match std::mem::replace(&mut self.run, Run::Empty) {
            Run::Empty => {}
            Run::Reads { reads, .. } if reads.is_empty() => {}
            Run::Writes { ops, .. } if ops.is_empty() => {}
            Run::Reads { mut reads, keys, permits } => {
                let count = reads.len();
                // Comes back with the replies; a read that fails as a whole holds nothing.
                let before = self.output.len();
                let mut held = std::mem::replace(&mut self.replies, self.context.memory.of(self.session.id));
                let replies = self
                    .context
                    .node
                    .store()
                    .read(ReadCommand::extent(keys), move |reader| {
                        let (mut replies, mut size) = (Vec::new(), 0);
                        for (_, read) in &reads {
                            let reply = read.reply(reader, &mut held, before + size);
                            size += reply.value_bytes();
                            replies.push(reply);
                            if size >= READ_VALUES {
                                break;
                            }
                        }
                        let rest = reads.split_off(replies.len());
                        Ok((replies, rest, held))
                    })
                    .await;
                drop(permits);
                match replies {
                    Ok((replies, rest, held)) => {
                        self.replies = held;
                        replies.into_iter().for_each(|reply| self.reply(reply));
                        return Ok(rest);
                    }
                    Err(error) => (0..count).for_each(|_| self.reply(store_error(&error))),
                }
            }
            Run::Writes { ops, answers, permits, values: _ } => {
                match self.context.node.store().write(ops, permits).await {
                    Ok(outcomes) => {
                        for (answer, outcome) in answers.into_iter().zip(outcomes) {
                            self.reply(answer.reply(outcome));
                        }
                    }
                    Err(error) => answers.iter().for_each(|_| self.reply(write_error(&error))),
                }
            }
        }
        Ok(Vec::new())
    }

    /// Adds a reply. One that is too much for what others hold is the last: what it is the reply to was done, and cannot be refused.
    fn reply(&mut self, reply: Reply) {
        if self.used_up {
            return;
        }
        let before = self.output.len();
        // A list is there twice while it is encoded.
        let mut held = self.replies.grow(before + reply.items() * ITEM_BYTES);
        if held.is_ok() {
            reply.encode(self.session.version, &mut self.output);
            held = self.replies.grow(self.output.len());
        }
        if let Err(error) = held {
            self.used_up = true;
            self.output.truncate(before);
            let why = format!(
                "ERR {error}; the connection is closed, and what was sent by it and not answered may have been done"
            );
            Reply::error(why).encode(self.session.version, &mut self.output);
        }
    }

    async fn send_if_full(&mut self) -> io::Result<()> {
        if self.output.len() >= WRITE_BYTES { self.send().await } else { Ok(()) }
    }

    async fn send(&mut self) -> io::Result<()> {
        if !self.output.is_empty() {
            // What it took to make the replies is gone, and their client may be slow.
            let _ = self.requests.set(self.held());
            let _ = self.replies.set(self.output.len());
            self.stream.write_all(&self.output).await?;
            // A large reply's memory is not kept for the connection's life.
            if self.output.capacity() > 4 * WRITE_BYTES {
                self.output = BytesMut::new();
            } else {
                self.output.clear();
            }
            let _ = self.replies.set(0);
        }
        Ok(())
    }
}
