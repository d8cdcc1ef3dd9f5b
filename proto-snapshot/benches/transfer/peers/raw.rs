//! Raw TCP with the same checksum: what a socket gives, with one thread at each end.

use std::fs::File;
use std::io::{IoSlice, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt as _;
use std::time::Instant;

use bytes::Bytes;
use proto_common::checksum::crc64;

use crate::payload::Payload;
use crate::side::{Before, Sent, Side, report_when_asked};

/// Length and checksum.
const HEADER: usize = 16;

pub fn receive(side: &Side) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let path = side.path.clone();
    let chunk = side.chunk;
    std::thread::spawn(move || take(listener.accept().unwrap().0, path.as_deref(), chunk));
    report_when_asked(address);
}

fn take(mut stream: TcpStream, path: Option<&std::path::Path>, chunk: usize) {
    let file = path.map(|path| File::create(path).unwrap());
    let mut buffer = vec![0; chunk];
    let mut at = 0;
    loop {
        let mut header = [0; HEADER];
        stream.read_exact(&mut header).unwrap();
        let (len, crc) = header.split_at(8);
        let len = u64::from_le_bytes(len.try_into().unwrap());
        if len == 0 {
            break;
        }
        let payload = &mut buffer[..len as usize];
        stream.read_exact(payload).unwrap();
        assert_eq!(crc64(payload).to_le_bytes(), crc, "the checksum is the sender's");
        if let Some(file) = &file {
            file.write_all_at(payload, at).unwrap();
        }
        at += len;
    }
    if let Some(file) = file {
        file.sync_all().unwrap();
        File::open(path.unwrap().parent().unwrap()).unwrap().sync_all().unwrap();
    }
    stream.write_all(&[1]).unwrap();
}

pub fn send(side: &Side, address: &str) -> Sent {
    let payload = Payload::new();
    let before = Before::now();
    let began = Instant::now();
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_nodelay(true).unwrap();
    match &side.path {
        None => payload.pieces(side.bytes, side.chunk).for_each(|piece| write(&mut stream, &piece)),
        Some(path) => {
            let file = File::open(path).unwrap();
            let mut buffer = vec![0; side.chunk];
            let mut at = 0;
            while at < side.bytes {
                let piece = &mut buffer[..side.chunk.min((side.bytes - at) as usize)];
                file.read_exact_at(piece, at).unwrap();
                write(&mut stream, piece);
                at += piece.len() as u64;
            }
        }
    }
    write(&mut stream, &Bytes::new());
    stream.read_exact(&mut [0]).unwrap();
    Sent { seconds: began.elapsed().as_secs_f64(), usage: before.usage() }
}

fn write(stream: &mut TcpStream, payload: &[u8]) {
    let mut header = [0; HEADER];
    header[..8].copy_from_slice(&(payload.len() as u64).to_le_bytes());
    header[8..].copy_from_slice(&crc64(payload).to_le_bytes());
    let mut slices = [IoSlice::new(&header), IoSlice::new(payload)];
    let mut slices = &mut slices[..];
    while slices.iter().any(|slice| !slice.is_empty()) {
        let written = stream.write_vectored(slices).unwrap();
        IoSlice::advance_slices(&mut slices, written);
    }
}
