//! What the demo loads: a generated set, lines of `key<TAB>value`, or a dump of Redis commands as `redis-cli --pipe` takes it.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use bytes::{Bytes, BytesMut};
use proto::common::checksum::crc64;
use redis_protocol::resp2::types::BytesFrame;

use super::client::Client;
use crate::common::{SlotRange, slot_of};
use crate::resp::{Limits, RequestDecoder};

/// Bytes of a generated value.
const VALUE_BYTES: usize = 100;
/// Commands that are sent before their replies are read.
const BATCH: usize = 4096;
/// The same in bytes.
const BATCH_BYTES: usize = 8 << 20;

/// Where the data comes from.
#[derive(Debug, Clone)]
pub enum Source {
    /// So many keys.
    Generated(u64),
    /// A file of lines or commands.
    File(PathBuf),
}

/// One command to load, and what it does.
#[derive(Debug, PartialEq, Eq)]
struct Step {
    arguments: Vec<Bytes>,
    effect: Effect,
}

#[derive(Debug, PartialEq, Eq)]
enum Effect {
    Set { key: Bytes, value: Bytes, expires: bool },
    Expires { key: Bytes, expires: bool },
    Delete { key: Bytes },
    Nothing,
}

/// What a key has to hold in the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expected {
    /// Length of the value.
    pub len: usize,
    /// CRC-64/NVME of the value.
    pub crc: u64,
    /// It may be gone when it is read.
    pub expires: bool,
}

impl Expected {
    /// Of a value that stays.
    #[must_use]
    pub fn of(value: &[u8]) -> Self {
        Self { len: value.len(), crc: crc64(value), expires: false }
    }

    /// Whether `value` is the one.
    #[must_use]
    pub fn is(&self, value: &[u8]) -> bool {
        value.len() == self.len && crc64(value) == self.crc
    }
}

/// What was loaded.
#[derive(Debug, Default)]
pub struct Loaded {
    /// By key.
    pub keys: HashMap<Bytes, Expected>,
    /// Commands that were sent.
    pub commands: u64,
}

impl Loaded {
    /// Bytes of keys and values in `range`.
    #[must_use]
    pub fn bytes_in(&self, range: SlotRange) -> u64 {
        self.keys
            .iter()
            .filter(|(key, _)| range.contains(slot_of(key)))
            .map(|(key, value)| u64::try_from(key.len() + value.len).unwrap_or(u64::MAX))
            .sum()
    }

    fn apply(&mut self, effect: Effect) {
        match effect {
            Effect::Set { key, value, expires } => {
                // A slice of the input would keep all of that in memory.
                let key = Bytes::copy_from_slice(&key);
                self.keys.insert(key, Expected { expires, ..Expected::of(&value) });
            }
            Effect::Expires { key, expires } => {
                if let Some(expected) = self.keys.get_mut(&key) {
                    expected.expires = expires;
                }
            }
            Effect::Delete { key } => {
                self.keys.remove(&key);
            }
            Effect::Nothing => {}
        }
    }
}

/// Loads everything through one connection, in order, and returns what the keys have to hold. `progress` is told how
/// many commands were done.
///
/// # Errors
///
/// The input is not what it should be, or the node refused a command: says which.
pub async fn load(source: &Source, client: &mut Client, progress: impl Fn(u64)) -> anyhow::Result<Loaded> {
    let mut steps = steps(source)?;
    let mut loaded = Loaded::default();
    loop {
        let mut batch = Vec::new();
        while batch.len() < BATCH && client.queued_bytes() < BATCH_BYTES {
            let Some(step) = steps.next().transpose()? else { break };
            client.push(&step.arguments)?;
            batch.push(step.effect);
        }
        if batch.is_empty() {
            return Ok(loaded);
        }
        client.send().await?;
        for effect in batch {
            loaded.commands += 1;
            if let BytesFrame::Error(error) = client.reply().await? {
                bail!("command {} of the input was refused: {error}", loaded.commands);
            }
            loaded.apply(effect);
        }
        progress(loaded.commands);
    }
}

type Steps = Box<dyn Iterator<Item = anyhow::Result<Step>> + Send>;

fn steps(source: &Source) -> anyhow::Result<Steps> {
    match source {
        Source::Generated(keys) => Ok(Box::new((0..*keys).map(|n| Ok(generated(n))))),
        Source::File(path) => {
            let open = || File::open(path).with_context(|| format!("cannot open {}", path.display()));
            let mut head = Vec::new();
            open()?.take(2).read_to_end(&mut head)?;
            let file = open()?;
            match head.as_slice() {
                [b'*', digit] if digit.is_ascii_digit() => Ok(commands(file, path)),
                _ => Ok(lines(file, path)),
            }
        }
    }
}

fn set(key: Bytes, value: Bytes) -> Step {
    Step {
        arguments: vec![Bytes::from_static(b"SET"), key.clone(), value.clone()],
        effect: Effect::Set { key, value, expires: false },
    }
}

fn generated(n: u64) -> Step {
    let mut value = format!("value {n} ");
    while value.len() < VALUE_BYTES {
        // Different for each key, and the same each time.
        let next = crc64(value.as_bytes());
        value += &format!("{next:016x}");
    }
    value.truncate(VALUE_BYTES);
    set(Bytes::from(format!("key:{n:012}")), Bytes::from(value))
}

fn lines(file: File, path: &Path) -> Steps {
    let path = path.to_path_buf();
    let lines = BufReader::with_capacity(1 << 20, file).split(b'\n');
    Box::new((1u64..).zip(lines).filter_map(move |(number, line)| {
        let step = line.with_context(|| format!("cannot read {}", path.display())).and_then(|line| {
            let line = Bytes::from(line);
            let tab = line.iter().position(|&b| b == b'\t');
            match tab {
                Some(tab) => Ok(Some(set(line.slice(..tab), line.slice(tab + 1..)))),
                None if line.is_empty() => Ok(None),
                None => bail!("{}, line {number}: there is no tab between key and value", path.display()),
            }
        });
        step.transpose()
    }))
}

/// Reads commands, and makes those of many keys into many of one: the keys may be of different slots.
struct Commands {
    file: BufReader<File>,
    path: PathBuf,
    decoder: RequestDecoder,
    input: BytesMut,
    number: u64,
    ready: std::collections::VecDeque<Step>,
    ended: bool,
}

fn commands(file: File, path: &Path) -> Steps {
    Box::new(Commands {
        file: BufReader::with_capacity(1 << 20, file),
        path: path.to_path_buf(),
        decoder: RequestDecoder::new(Limits::default()),
        input: BytesMut::new(),
        number: 0,
        ready: std::collections::VecDeque::new(),
        ended: false,
    })
}

impl Commands {
    fn read(&mut self) -> anyhow::Result<Option<Step>> {
        loop {
            if let Some(step) = self.ready.pop_front() {
                return Ok(Some(step));
            }
            let place = |number: u64| format!("{}, command {number}", self.path.display());
            if let Some(arguments) =
                self.decoder.decode(&mut self.input).with_context(|| place(self.number + 1))?
            {
                self.number += 1;
                self.ready.extend(understand(arguments).with_context(|| place(self.number))?);
                continue;
            }
            let piece = self.file.fill_buf().with_context(|| place(self.number + 1))?;
            if piece.is_empty() {
                if !self.input.is_empty() {
                    bail!("{} is cut off after command {}", self.path.display(), self.number);
                }
                return Ok(None);
            }
            let len = piece.len();
            self.input.extend_from_slice(piece);
            self.file.consume(len);
        }
    }
}

impl Iterator for Commands {
    type Item = anyhow::Result<Step>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let step = self.read().transpose();
        self.ended = !matches!(step, Some(Ok(_)));
        step
    }
}

fn understand(arguments: Vec<Bytes>) -> anyhow::Result<Vec<Step>> {
    let Some((name, rest)) = arguments.split_first() else { return Ok(Vec::new()) };
    let name = name.to_ascii_uppercase();
    let one = |effect: Effect| Ok(vec![Step { arguments: arguments.clone(), effect }]);
    match (name.as_slice(), rest) {
        (b"SET", [key, value, options @ ..]) => {
            let upper: Vec<_> = options.iter().map(|option| option.to_ascii_uppercase()).collect();
            if upper.iter().any(|option| matches!(option.as_slice(), b"NX" | b"XX" | b"GET" | b"KEEPTTL")) {
                bail!("SET with a condition: what it leaves depends on what was there");
            }
            one(Effect::Set { key: key.clone(), value: value.clone(), expires: !options.is_empty() })
        }
        (b"SETEX" | b"PSETEX", [key, _, value]) => {
            one(Effect::Set { key: key.clone(), value: value.clone(), expires: true })
        }
        (b"MSET", pairs) if !pairs.is_empty() && pairs.len() % 2 == 0 => {
            let (pairs, _) = pairs.as_chunks::<2>();
            Ok(pairs.iter().map(|[key, value]| set(key.clone(), value.clone())).collect())
        }
        (b"DEL" | b"UNLINK", keys) if !keys.is_empty() => Ok(keys
            .iter()
            .map(|key| Step {
                arguments: vec![Bytes::from_static(b"DEL"), key.clone()],
                effect: Effect::Delete { key: key.clone() },
            })
            .collect()),
        (b"EXPIRE" | b"PEXPIRE" | b"EXPIREAT" | b"PEXPIREAT", [key, _]) => {
            one(Effect::Expires { key: key.clone(), expires: true })
        }
        (b"PERSIST", [key]) => one(Effect::Expires { key: key.clone(), expires: false }),
        (b"SELECT", [database]) if database.as_ref() == b"0" => one(Effect::Nothing),
        (b"PING" | b"ECHO", _) => one(Effect::Nothing),
        _ => bail!(
            "{} with {} arguments is nothing that the demo can check; it loads SET, SETEX, PSETEX, MSET, DEL, the EXPIRE family and PERSIST",
            String::from_utf8_lossy(&name[..name.len().min(40)]),
            rest.len()
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(content: &[u8]) -> anyhow::Result<Loaded> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), content).unwrap();
        let mut loaded = Loaded::default();
        for step in steps(&Source::File(file.path().into()))? {
            loaded.apply(step?.effect);
        }
        Ok(loaded)
    }

    fn holds(loaded: &Loaded, expected: &[(&str, &str, bool)]) {
        assert_eq!(loaded.keys.len(), expected.len(), "{loaded:?}");
        for (key, value, expires) in expected {
            let found = loaded.keys[key.as_bytes()];
            assert!(found.is(value.as_bytes()) && found.expires == *expires, "{key}: {found:?}");
        }
    }

    #[test]
    fn lines_of_key_and_value() {
        let loaded = read(b"a\t1\n\nb\tx\ty\r\na\t2\n\tempty").unwrap();
        holds(&loaded, &[("a", "2", false), ("b", "x\ty\r", false), ("", "empty", false)]);
        let error = read(b"a\t1\nb\n").unwrap_err().to_string();
        assert!(error.contains("line 2"), "{error}");
    }

    #[test]
    fn a_dump_of_commands() {
        let dump = b"*3\r\n$3\r\nSET\r\n$1\r\na\r\n$2\r\n\r\n\r\n*5\r\n$4\r\nMSET\r\n$1\r\nb\r\n$1\r\n2\r\n$1\r\nc\r\n$1\r\n3\r\n\
            *2\r\n$3\r\nDEL\r\n$1\r\nc\r\n*3\r\n$6\r\nEXPIRE\r\n$1\r\nb\r\n$3\r\n100\r\n*4\r\n$5\r\nSETEX\r\n$1\r\nd\r\n$2\r\n10\r\n$1\r\n4\r\n";
        holds(&read(dump).unwrap(), &[("a", "\r\n", false), ("b", "2", true), ("d", "4", true)]);
    }

    #[test]
    fn what_cannot_be_checked_is_refused() {
        for (dump, why) in [
            (&b"*2\r\n$4\r\nINCR\r\n$1\r\na\r\n"[..], "INCR"),
            (b"*4\r\n$3\r\nSET\r\n$1\r\na\r\n$1\r\n1\r\n$2\r\nnx\r\n", "condition"),
            (b"*2\r\n$3\r\nDEL\r\n$1\r\n", "cut off"),
            (b"*1\r\n:1\r\n", "expected '$'"),
        ] {
            let error = format!("{:#}", read(dump).unwrap_err());
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn generated_values_differ_and_are_the_same_each_time() {
        assert_eq!(generated(7), generated(7));
        assert_ne!(generated(7), generated(8));
        assert_eq!(generated(7).arguments[2].len(), VALUE_BYTES);
    }
}
