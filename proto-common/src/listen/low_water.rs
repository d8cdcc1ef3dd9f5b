//! `SO_RCVLOWAT`: how much has to have come before a socket counts as readable.

use std::io;
use std::os::fd::AsFd;
use std::sync::LazyLock;

use nix::sys::socket::setsockopt;
use nix::sys::utsname::uname;
use nix::{libc, setsockopt_impl, sockopt_impl};

sockopt_impl!(
    /// Bytes that have to be there.
    ReceiveLowWater,
    SetOnly,
    libc::SOL_SOCKET,
    libc::SO_RCVLOWAT,
    usize
);

/// Whether the kernel keeps to what this needs: that it tells at once of what is there already when less is waited for (Linux 4.18), and of less than is waited for
/// when its buffer is full (5.8) or memory is short (5.12). With what is older, reading is not held back.
static IS_SOUND: LazyLock<bool> =
    LazyLock::new(|| uname().is_ok_and(|kernel| kernel.release().to_str().is_some_and(is_sound)));

fn is_sound(release: &str) -> bool {
    let mut parts = release.split(|char: char| !char.is_ascii_digit()).map(str::parse);
    let version = (parts.next().and_then(Result::ok), parts.next().and_then(Result::ok));
    matches!(version, (Some(major), Some(minor)) if (major, minor) >= (5_u32, 12_u32))
}

/// As [`set_low_water`](super::RemotePeer::set_low_water) says.
pub(super) fn set(socket: &impl AsFd, bytes: usize) -> io::Result<()> {
    if *IS_SOUND {
        setsockopt(socket, ReceiveLowWater, &bytes)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd as _;
    use std::pin::Pin;
    use std::task::{Context, Poll};

    use nix::sys::socket::{MsgFlags, recv};
    use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _, ReadBuf};
    use tokio::net::{TcpListener, TcpStream};
    use tokio_stream::StreamExt as _;
    use tokio_stream::wrappers::TcpListenerStream;
    use tokio_util::codec::{FramedRead, LengthDelimitedCodec};

    use super::super::frames::PREFACE;
    use super::super::{LOW_WATER, Limited, LimitedConnection, RemotePeer};
    use super::*;
    use crate::limits::ConnectionLimits;
    use crate::peer::PeerKey;

    #[test]
    fn only_kernels_that_lose_no_wake_up() {
        for (release, sound) in [
            ("5.12.0", true),
            ("5.15.0-28-amd64", true),
            ("6.18.0+", true),
            ("10.0", true),
            ("5.11.22", false),
        ] {
            assert_eq!(is_sound(release), sound, "{release}");
        }
        for release in ["4.19.0-generic", "3.10", "6", "", "x.y"] {
            assert!(!is_sound(release), "{release}");
        }
    }

    /// A socket, and what each read of it got.
    #[derive(Debug)]
    struct Counted(TcpStream, Vec<usize>);

    impl RemotePeer for Counted {
        fn remote_peer(&self) -> PeerKey {
            self.0.remote_peer()
        }

        fn set_low_water(&self, bytes: usize) -> io::Result<()> {
            self.0.set_low_water(bytes)
        }
    }

    impl AsyncRead for Counted {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            let before = buf.filled().len();
            let read = Pin::new(&mut self.0).poll_read(cx, buf);
            if buf.filled().len() > before {
                self.1.push(buf.filled().len() - before);
            }
            read
        }
    }

    async fn connection() -> (LimitedConnection<Counted>, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut there = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        there.set_nodelay(true).unwrap();
        let incoming = TcpListenerStream::new(listener).map(|socket| Ok(Counted(socket?, Vec::new())));
        let mut here = Limited::new(incoming, ConnectionLimits::default()).next().await.unwrap().unwrap();
        there.write_all(PREFACE).await.unwrap();
        here.read_exact(&mut [0; PREFACE.len()]).await.unwrap();
        (here, there)
    }

    fn frame(len: usize) -> Vec<u8> {
        let head = u32::try_from(len).unwrap().to_be_bytes();
        [&head[1..], &[0, 0, 0, 0, 0, 1], &vec![7; len]].concat()
    }

    /// Sends `frames` in pieces of 32 KiB, each when the one before has come or was read, and returns what each read of the socket got. They are taken as h2 does.
    async fn reads(frames: &[u8]) -> Vec<usize> {
        let (here, mut there) = connection().await;
        let codec = LengthDelimitedCodec::builder()
            .length_field_length(3)
            .length_adjustment(9)
            .num_skip(0)
            .max_frame_length(4 * LOW_WATER)
            .new_codec();
        let mut taken = FramedRead::new(here, codec);
        let (mut sent, mut peeked) = (0, vec![0; 4 * LOW_WATER]);
        for piece in frames.chunks(32 << 10) {
            there.write_all(piece).await.unwrap();
            sent += piece.len();
            // All that was sent and not read is there ...
            while {
                let Counted(socket, reads) = taken.get_ref().get_ref();
                let waits = sent + PREFACE.len() - reads.iter().sum::<usize>();
                let peek = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
                waits > 0 && recv(socket.as_raw_fd(), &mut peeked[..waits], peek).unwrap_or(0) < waits
            } {
                tokio::task::yield_now().await;
            }
            // ... and is read, as far as the runtime knows of it.
            for _ in 0..100 {
                tokio::select! {
                    biased;
                    _ = taken.next() => {}
                    () = tokio::task::yield_now() => {}
                }
            }
        }
        let reads = taken.get_ref().get_ref().1[1..].to_vec();
        assert_eq!(reads.iter().sum::<usize>(), sent, "all of it was read: {reads:?}");
        reads
    }

    #[tokio::test]
    async fn a_long_frame_is_read_in_large_pieces_and_what_follows_at_once() {
        let short = reads(&frame(4 << 10).repeat(32)).await;
        assert!(short.len() >= 4, "short ones are read as they come: {short:?}");
        // The last one comes in a piece of its own, as a ping would.
        let long = [frame(3 * LOW_WATER), frame(8)].concat();
        let pieces = long.len().div_ceil(32 << 10);
        let long = reads(&long).await;
        if *IS_SOUND {
            assert!(long.len() < pieces / 3, "{long:?}");
            assert!(long.iter().filter(|read| **read >= LOW_WATER).count() >= 2, "{long:?}");
        } else {
            assert!(long.len() >= pieces - 1, "nothing is held back: {long:?}");
        }
    }

    #[tokio::test]
    async fn an_end_in_the_middle_of_a_frame_is_told_at_once() {
        let (mut here, mut there) = connection().await;
        let frame = frame(2 * LOW_WATER);
        there.write_all(&frame[..1000]).await.unwrap();
        here.read_exact(&mut [0; 1000]).await.unwrap();
        there.write_all(&frame[1000..2000]).await.unwrap();
        drop(there);
        assert_eq!(here.read_to_end(&mut Vec::new()).await.unwrap(), 1000);
    }
}
