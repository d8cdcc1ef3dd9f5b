//! Requests that are small and come in time.
//!
//! tonic gathers the message of a unary call before a handler sees it, for as long as it takes. A peer that declares much and sends it slowly, or
//! not at all, on all streams of all its connections would hold memory that no limit of a service counts, and tonic takes what is declared as soon as that is.
//! So requests have to be small and in time, of those that are waited for there may be so many at once, and none of them is shown to tonic before it is there.

mod brief;

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::LazyLock;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body as _, Frame};
use tokio::time::{Instant, Sleep, sleep_until};
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{Service, StdError, http};
use tonic::server::NamedService;

use self::brief::Brief;
use crate::access::Caller;
use crate::bulk::PREFIX;
use crate::error::{CommonReason, Error, RETRY_AFTER};
use crate::peer::PeerKey;
use crate::shares::{Share, Shares};

/// Largest message of a unary call, in bytes: some identifiers, a text for people, a page token. All streams of a connection together
/// hold 5 MiB.
pub const MAX_REQUEST_BYTES: usize = 16 << 10;

/// Time for all of a request, like that for the first frame of a stream.
pub const REQUEST_TIME: Duration = Duration::from_secs(30);

/// Requests that are waited for at once in this process, because not all of them is there, or, of a stream, not its first message. Each may hold
/// [`MAX_REQUEST_BYTES`], and as much of headers: 256 MiB in all.
pub const WAITED_FOR: u64 = 8192;

/// Of them, those of one peer, while there are no others: no peer gets more than a quarter of what the others leave, so that behind peers which take all
/// that they can there is something for the next one. One more is refused with `IDLE_TIMEOUT` at once.
pub const WAITED_FOR_PER_PEER: u64 = 2048;

static WAITING: LazyLock<Shares<PeerKey>> = LazyLock::new(|| Shares::graded(WAITED_FOR, WAITED_FOR_PER_PEER));

/// `first`, the first message of a stream, which should have at most [`MAX_REQUEST_BYTES`]. Where it is not there yet, it takes a place among those that are waited for
/// meanwhile. How long that may take is for `first` to say. As cancel safe as that.
///
/// # Errors
///
/// Those of `first`; `IDLE_TIMEOUT` if there is no place, which is worth trying again.
pub async fn first<T>(peer: &PeerKey, first: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    let mut first = pin!(first);
    if let Poll::Ready(first) = poll_fn(|cx| Poll::Ready(first.as_mut().poll(cx))).await {
        return first;
    }
    let _waiting = wait_for(peer)?;
    first.await
}

/// A place among those whose request is waited for, until dropped.
fn wait_for(peer: &PeerKey) -> Result<Share<PeerKey>, Error> {
    WAITING.take(Some(peer), 1).map_err(|full| {
        let message = format!(
            "not all of the request is there, and {} others are waited for already; send it again, in one piece",
            full.limit()
        );
        Error::new(CommonReason::IdleTimeout, message).retry_after(RETRY_AFTER)
    })
}

/// `S`, whose requests come within [`REQUEST_TIME`]; others fail with `IDLE_TIMEOUT`. A request that is not all there holds what has come of it, its headers, and
/// nothing of the service or its decoder.
#[derive(Debug, Clone)]
pub struct Prompt<S> {
    inner: S,
    wanted: Wanted,
}

impl<S> Prompt<S> {
    /// Stands in front of a generated service without client streaming. It is called when all of a request is there, or nothing good can come of it.
    pub fn new(inner: S) -> Self {
        Self { inner, wanted: Wanted::All }
    }

    /// Stands in front of a generated service with client streaming, of which a call is over within [`REQUEST_TIME`], also where its client takes nothing of the
    /// answer. It is called at once, since a client may wait for the headers of the answer before it sends something; its decoder gets the first message in one piece.
    ///
    /// A call takes a place among the requests that are waited for ([`WAITED_FOR`]) as long as it lasts. More than [`MAX_REQUEST_BYTES`] of requests that the service has not
    /// read, which waits until the client takes the answers to those before, end it with `LIMIT_EXCEEDED`, and its time with `IDLE_TIMEOUT`. Nothing is held
    /// of it after that.
    pub fn streaming(inner: S) -> Self {
        Self { inner, wanted: Wanted::First }
    }
}

impl<S: NamedService> NamedService for Prompt<S> {
    const NAME: &'static str = S::NAME;
}

impl<S, B> Service<http::Request<B>> for Prompt<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>> + Clone,
    S::Future: Unpin,
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<StdError>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Prompted<S>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let request = request.map(Body::new);
        if self.wanted == Wanted::All {
            return Prompted::whole(self.inner.clone(), request);
        }
        let peer = peer_of(&request);
        let (parts, body) = request.into_parts();
        Prompted(match Brief::begin(body, peer, Instant::now() + REQUEST_TIME) {
            Ok((call, body)) => {
                State::Brief(Box::new((self.inner.call(http::Request::from_parts(parts, body)), Some(call))))
            }
            Err(status) => State::Refused(Some(status)),
        })
    }
}

/// What [`Prompt`] answers.
pub struct Prompted<S: Service<http::Request<Body>>>(State<S>);

enum State<S: Service<http::Request<Body>>> {
    Waiting(Box<Waiting<S>>),
    Called(S::Future),
    Brief(Box<(S::Future, Option<Brief>)>),
    Refused(Option<Status>),
}

struct Waiting<S> {
    service: S,
    request: http::Request<PromptBody>,
}

impl<S: Service<http::Request<Body>>> std::fmt::Debug for Prompted<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Prompted").field(&!matches!(self.0, State::Waiting(_))).finish()
    }
}

impl<S: Service<http::Request<Body>>> Prompted<S> {
    /// Calls `service` when all of `request` is there, within [`REQUEST_TIME`].
    pub(crate) fn whole(service: S, request: http::Request<Body>) -> Self {
        Self(State::Waiting(Box::new(Waiting { service, request: in_time(request) })))
    }

    /// Of a service that was called.
    pub(crate) fn called(answer: S::Future) -> Self {
        Self(State::Called(answer))
    }
}

impl<S> Future for Prompted<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>> + Clone,
    S::Future: Unpin,
{
    type Output = Result<S::Response, S::Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        loop {
            match &mut self.0 {
                State::Called(answer) => return Pin::new(answer).poll(cx),
                State::Brief(called) => {
                    let (answer, call) = &mut **called;
                    let answered = Pin::new(answer).poll(cx);
                    let (Poll::Pending, Some(open)) = (&answered, &*call) else {
                        let call = call.take();
                        return answered.map_ok(|answer| match call {
                            Some(call) => call.answered(answer),
                            None => answer,
                        });
                    };
                    return open.poll_over(cx).map(Ok);
                }
                State::Refused(status) => {
                    let status = status.take().unwrap_or_else(|| Status::internal("polled after its end"));
                    return Poll::Ready(Ok(status.into_http()));
                }
                State::Waiting(waiting) => {
                    let Waiting { service, request } = &mut **waiting;
                    ready!(request.body_mut().poll_gathered(cx));
                    ready!(service.poll_ready(cx))?;
                    let request = std::mem::take(request).map(Body::new);
                    let answer = service.call(request);
                    self.0 = State::Called(answer);
                }
            }
        }
    }
}

/// The request, all of which has to come within [`REQUEST_TIME`] from now.
fn in_time(request: http::Request<Body>) -> http::Request<PromptBody> {
    let peer = peer_of(&request);
    request.map(|body| PromptBody::new(body, peer, Wanted::All))
}

fn peer_of(request: &http::Request<Body>) -> PeerKey {
    Caller::of(request.extensions()).map_or(PeerKey::Unknown, |caller| caller.peer().key())
}

/// What of a body is gathered before it is handed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    All,
    /// The first message.
    First,
}

struct PromptBody {
    inner: Body,
    peer: PeerKey,
    until: Instant,
    /// Made when something has to be waited for, which is rare.
    waiting: Option<(Pin<Box<Sleep>>, Share<PeerKey>)>,
    /// What is gathered, as long as it is; a copy, since a slice would keep the buffer that the connection read it into.
    gathered: Option<Vec<u8>>,
    wanted: Wanted,
    /// What was gathered, and then what ended that.
    next: [Option<Result<Frame<Bytes>, Status>>; 2],
    has_ended: bool,
}

/// That of a request that was handed on.
impl Default for PromptBody {
    fn default() -> Self {
        Self::new(Body::empty(), PeerKey::Unknown, Wanted::First)
    }
}

impl PromptBody {
    fn new(inner: Body, peer: PeerKey, wanted: Wanted) -> Self {
        Self {
            inner,
            peer,
            until: Instant::now() + REQUEST_TIME,
            waiting: None,
            gathered: Some(Vec::new()),
            wanted,
            next: [None, None],
            has_ended: false,
        }
    }

    /// Ready when what is wanted is there, or will not come.
    fn poll_gathered(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while let Some(gathered) = &mut self.gathered {
            let next =
                match ready!(poll_in_time(&mut self.inner, &self.peer, self.until, &mut self.waiting, cx)) {
                    Some(Ok(frame)) => match frame.into_data() {
                        Ok(data) => {
                            let is_last = self.inner.is_end_stream();
                            let len = gathered.len() + data.len();
                            let first = first_len(gathered, &data);
                            let is_there = match self.wanted {
                                Wanted::All => is_last,
                                Wanted::First => first.is_some_and(|first| len as u64 >= first) || is_last,
                            };
                            // The decoder refuses what is too large, or compressed, by its prefix.
                            let most = (PREFIX + MAX_REQUEST_BYTES) as u64;
                            let is_enough =
                                is_there || len as u64 > most || first.is_some_and(|first| first > most);
                            if gathered.is_empty() && is_enough {
                                self.gathered = None;
                                self.next = [Some(Ok(Frame::data(data))), None];
                                continue;
                            }
                            if len > gathered.capacity() {
                                // As large as the message at most: what is behind it comes alone.
                                let all = first
                                    .filter(|first| *first <= most)
                                    .and_then(|len| usize::try_from(len).ok());
                                let room = all.unwrap_or(usize::MAX).min(2 * len).max(len);
                                gathered.reserve_exact(room - gathered.len());
                            }
                            gathered.extend_from_slice(&data);
                            if !is_enough {
                                continue;
                            }
                            None
                        }
                        Err(trailers) => Some(Ok(trailers)),
                    },
                    Some(Err(status)) => {
                        gathered.clear();
                        Some(Err(status))
                    }
                    None => {
                        self.has_ended = true;
                        None
                    }
                };
            let gathered = self.gathered.take().filter(|gathered| !gathered.is_empty());
            self.next = [gathered.map(|gathered| Ok(Frame::data(gathered.into()))), next];
        }
        Poll::Ready(())
    }
}

/// Length of the first message with its prefix, if that is there: in `gathered` and the `data` behind it. `u64::MAX` for one that is compressed.
fn first_len(gathered: &[u8], data: &[u8]) -> Option<u64> {
    let mut prefix = [0; PREFIX];
    let mut bytes = gathered.iter().chain(data);
    for byte in &mut prefix {
        *byte = *bytes.next()?;
    }
    let [flag, len @ ..] = prefix;
    Some(if flag == 0 { PREFIX as u64 + u64::from(u32::from_be_bytes(len)) } else { u64::MAX })
}

/// The next frame of `inner`, or why there is none; what is waited for takes a place.
fn poll_in_time(
    inner: &mut Body,
    peer: &PeerKey,
    until: Instant,
    waiting: &mut Option<(Pin<Box<Sleep>>, Share<PeerKey>)>,
    cx: &mut Context<'_>,
) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
    if let Poll::Ready(frame) = Pin::new(inner).poll_frame(cx) {
        return Poll::Ready(frame);
    }
    let (timer, _) = match waiting {
        Some(waiting) => waiting,
        waiting => match wait_for(peer) {
            Ok(share) => waiting.insert((Box::pin(sleep_until(until)), share)),
            Err(error) => return Poll::Ready(Some(Err(error.into()))),
        },
    };
    ready!(timer.as_mut().poll(cx));
    Poll::Ready(Some(Err(late("the request did not come").into())))
}

fn late(what: &str) -> Error {
    let message = format!("{what} within {REQUEST_TIME:?}; send it again");
    Error::new(CommonReason::IdleTimeout, message).retry_after(RETRY_AFTER)
}

impl http_body::Body for PromptBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        ready!(this.poll_gathered(cx));
        if let Some(next) = this.next.iter_mut().find_map(Option::take) {
            return Poll::Ready(Some(next));
        }
        if this.has_ended {
            return Poll::Ready(None);
        }
        poll_in_time(&mut this.inner, &this.peer, this.until, &mut this.waiting, cx)
    }

    fn is_end_stream(&self) -> bool {
        let is_held = self.next.iter().any(Option::is_some)
            || self.gathered.as_ref().is_some_and(|gathered| !gathered.is_empty());
        !is_held && (self.has_ended || self.inner.is_end_stream())
    }
}

#[cfg(test)]
mod tests {
    use http_body::Body as _;

    use super::*;

    /// Held by each test: there is one count of those that are waited for.
    static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

    /// Sends that byte every second, for ever.
    struct Drip(u8, Pin<Box<Sleep>>);

    impl http_body::Body for Drip {
        type Data = Bytes;
        type Error = Status;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
            ready!(self.1.as_mut().poll(cx));
            self.1 = Box::pin(tokio::time::sleep(Duration::from_secs(1)));
            Poll::Ready(Some(Ok(Frame::data(vec![self.0].into()))))
        }
    }

    fn peer(host: u8) -> PeerKey {
        PeerKey::Address([10, 9, 8, host].into())
    }

    #[tokio::test]
    async fn one_request_more_of_a_peer_than_are_waited_for_is_refused_at_once() {
        let _alone = ALONE.lock().await;
        let all: Vec<_> = (0..WAITED_FOR_PER_PEER).map(|_| wait_for(&peer(2)).unwrap()).collect();
        let drip = || Body::new(Drip(0, Box::pin(tokio::time::sleep(Duration::from_secs(3600)))));
        let next = async |body: &mut PromptBody| {
            let frame = std::future::poll_fn(|cx| Poll::Ready(Pin::new(&mut *body).poll_frame(cx))).await;
            match frame {
                Poll::Ready(frame) => Some(frame.unwrap().map(drop).map_err(Error::from)),
                Poll::Pending => None,
            }
        };
        let refused = next(&mut PromptBody::new(drip(), peer(2), Wanted::All)).await.unwrap().unwrap_err();
        assert!(refused.is(CommonReason::IdleTimeout) && refused.is_retryable(), "{refused:?}");
        // What is all there need not be waited for, and other peers are not in question.
        let there = Body::new(http_body_util::Full::new(Bytes::from_static(b"x")));
        next(&mut PromptBody::new(there, peer(2), Wanted::All)).await.unwrap().unwrap();
        let mut other = PromptBody::new(drip(), peer(3), Wanted::All);
        assert!(next(&mut other).await.is_none(), "it is waited for");
        drop((all, other));
        let mut again = PromptBody::new(drip(), peer(2), Wanted::All);
        assert!(next(&mut again).await.is_none());
        let rest: Vec<_> = std::iter::from_fn(|| wait_for(&peer(2)).ok()).collect();
        assert_eq!(rest.len() as u64, WAITED_FOR_PER_PEER - 1, "the one that is waited for has a place");
    }

    #[tokio::test]
    async fn a_first_message_that_is_there_takes_no_place() {
        let _alone = ALONE.lock().await;
        let all: Vec<_> = (0..WAITED_FOR_PER_PEER).map(|_| wait_for(&peer(4)).unwrap()).collect();
        assert_eq!(first(&peer(4), async { Ok(7) }).await.unwrap(), 7);
        let later = || async {
            tokio::task::yield_now().await;
            Ok(7)
        };
        let refused = first(&peer(4), later()).await.unwrap_err();
        assert!(refused.is(CommonReason::IdleTimeout) && refused.is_retryable(), "{refused:?}");
        drop(all);
        assert_eq!(first(&peer(4), later()).await.unwrap(), 7);
    }

    #[tokio::test(start_paused = true)]
    async fn a_byte_now_and_then_does_not_help() {
        let _alone = ALONE.lock().await;
        // Of a request, of what the decoder takes as it comes, and of a stream with an empty message every five seconds.
        for (byte, wanted, handed_on) in
            [(0, Wanted::All, 0..=0), (b'x', Wanted::All, 25..=26), (0, Wanted::First, 25..=26)]
        {
            let began = Instant::now();
            let drip = Drip(byte, Box::pin(tokio::time::sleep(Duration::from_secs(1))));
            let mut body = PromptBody::new(Body::new(drip), peer(1), wanted);
            let mut came = 0;
            let status = loop {
                match poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await.unwrap() {
                    Ok(_) => came += 1,
                    Err(status) => break status,
                }
            };
            assert!(handed_on.contains(&came), "{came}");
            assert_eq!(began.elapsed().as_secs(), REQUEST_TIME.as_secs());
            let error = Error::from(status);
            assert!(error.is(CommonReason::IdleTimeout) && error.is_retryable(), "{error:?}");
        }
    }

    /// A body of these frames, and then nothing for ever, or the end.
    fn frames(frames: &[&[u8]], ends: bool) -> Body {
        use tokio_stream::StreamExt as _;
        let frames: Vec<_> =
            frames.iter().map(|data| Ok::<_, Status>(Frame::data(Bytes::copy_from_slice(data)))).collect();
        let frames = tokio_stream::iter(frames);
        match ends {
            true => Body::new(http_body_util::StreamBody::new(frames)),
            false => Body::new(http_body_util::StreamBody::new(frames.chain(tokio_stream::pending()))),
        }
    }

    /// What is handed on of a body until something has to be waited for.
    fn handed_on(body: &mut PromptBody) -> Vec<Vec<u8>> {
        let mut cx = Context::from_waker(std::task::Waker::noop());
        let mut all = Vec::new();
        while let Poll::Ready(Some(frame)) = Pin::new(&mut *body).poll_frame(&mut cx) {
            all.push(frame.unwrap().into_data().unwrap().to_vec());
        }
        all
    }

    fn message(len: usize) -> Vec<u8> {
        [&[0][..], &u32::try_from(len).unwrap().to_be_bytes(), &vec![7; len]].concat()
    }

    #[tokio::test]
    async fn a_request_is_handed_on_in_one_piece_and_holds_what_came() {
        let _alone = ALONE.lock().await;
        let whole = message(1000);
        for wanted in [Wanted::All, Wanted::First] {
            for len in [1, 4, 5, 6, 500, 1004] {
                let pieces: Vec<_> = whole[..len].chunks(1 + len / 9).collect();
                let mut begun = PromptBody::new(frames(&pieces, false), peer(5), wanted);
                assert!(handed_on(&mut begun).is_empty(), "{len} of {}", whole.len());
                let held = begun.gathered.as_ref().unwrap();
                assert_eq!(held.len(), len);
                assert!(held.capacity() <= 2 * len, "{} for {len}", held.capacity());
            }
            let pieces: Vec<_> = whole.chunks(90).collect();
            let mut ended = PromptBody::new(frames(&pieces, true), peer(5), wanted);
            assert_eq!(handed_on(&mut ended), std::slice::from_ref(&whole));
            assert_eq!(ended.is_end_stream(), wanted == Wanted::All, "of a stream more may come");
            // Its end is part of a request, and not of a first message.
            let mut open = PromptBody::new(frames(&pieces, false), peer(5), wanted);
            assert_eq!(handed_on(&mut open).len(), usize::from(wanted == Wanted::First));
            assert!(!open.is_end_stream());
            // Half of one is the decoder's to refuse.
            let mut half = PromptBody::new(frames(&[&whole[..500]], true), peer(5), wanted);
            assert_eq!(handed_on(&mut half), [whole[..500].to_vec()]);
        }
        let two = [message(3), message(4), message(5)];
        let pieces: Vec<_> = two.iter().map(Vec::as_slice).collect();
        assert_eq!(handed_on(&mut PromptBody::new(frames(&pieces, false), peer(5), Wanted::First)), two);
    }

    #[tokio::test]
    async fn what_the_decoder_refuses_by_its_prefix_is_handed_on_with_that() {
        let _alone = ALONE.lock().await;
        let compressed = [&[1][..], &message(100)[1..]].concat();
        for (sent, prefix) in
            [(message(MAX_REQUEST_BYTES + 1), 5), (message(100_000), 90_000), (compressed, 5)]
        {
            for wanted in [Wanted::All, Wanted::First] {
                let mut body =
                    PromptBody::new(frames(&[&sent[..3], &sent[3..prefix]], false), peer(6), wanted);
                assert_eq!(handed_on(&mut body), [sent[..prefix].to_vec()]);
            }
        }
        // More than a request behind one that is small.
        let more = [message(1), vec![0; MAX_REQUEST_BYTES]].concat();
        let mut body = PromptBody::new(frames(&[&more[..6], &more[6..]], false), peer(6), Wanted::All);
        assert_eq!(handed_on(&mut body), [more]);
    }

    /// Counts how often it is called, and answers what it was asked.
    #[derive(Clone)]
    struct Counts(std::sync::Arc<std::sync::atomic::AtomicUsize>);

    impl Service<http::Request<Body>> for Counts {
        type Response = http::Response<Body>;
        type Error = std::convert::Infallible;
        type Future = std::future::Ready<Result<Self::Response, Self::Error>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, request: http::Request<Body>) -> Self::Future {
            self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let (parts, body) = request.into_parts();
            let mut answer = http::Response::new(body);
            answer.extensions_mut().insert(parts);
            std::future::ready(Ok(answer))
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_service_is_called_with_a_whole_request_or_the_reason_why_there_is_none() {
        use http_body_util::BodyExt as _;
        let _alone = ALONE.lock().await;
        let service = Counts(std::sync::Arc::default());
        let called = || service.0.load(std::sync::atomic::Ordering::Relaxed);
        let request = |body| http::Request::get("/a.B/C").header("x", "y").body(body).unwrap();
        let whole = message(10);
        let mut first = Box::pin(Prompt::new(service.clone()).call(request(frames(&[&whole[..9]], false))));
        let polled = poll_fn(|cx| Poll::Ready(first.as_mut().poll(cx).is_ready())).await;
        assert!(!polled && called() == 0, "it is not there");
        let mut came = first.await.unwrap();
        assert_eq!(called(), 1);
        let asked: http::request::Parts = came.extensions_mut().remove().unwrap();
        assert_eq!((asked.uri.path(), asked.headers["x"].as_bytes()), ("/a.B/C", &b"y"[..]));
        let error = Error::from(came.body_mut().frame().await.unwrap().unwrap_err());
        assert!(error.is(CommonReason::IdleTimeout), "{error:?}");
        let came =
            Prompt::new(service.clone()).call(request(frames(&[&whole[..4], &whole[4..]], true))).await;
        assert_eq!(came.unwrap().into_body().collect().await.unwrap().to_bytes(), whole);
        // One that streams is called before its client sends anything.
        let _came = Prompt::streaming(service.clone()).call(request(frames(&[], false))).await.unwrap();
        assert_eq!(called(), 3);
    }

    /// Answers as server reflection does: from a task that reads no more while its answers are not taken.
    #[derive(Clone)]
    struct OneByOne;

    impl Service<http::Request<Body>> for OneByOne {
        type Response = http::Response<Body>;
        type Error = std::convert::Infallible;
        type Future = std::future::Ready<Result<Self::Response, Self::Error>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, request: http::Request<Body>) -> Self::Future {
            use http_body_util::BodyExt as _;
            let (answers, rest) = tokio::sync::mpsc::channel(1);
            let mut body = request.into_body();
            tokio::spawn(async move {
                while let Some(Ok(frame)) = body.frame().await {
                    let data = frame.into_data().unwrap();
                    // More than wait for the client.
                    for data in [data, Bytes::from_static(b"2"), Bytes::from_static(b"3")] {
                        if answers.send(Ok::<_, Status>(Frame::data(data))).await.is_err() {
                            return;
                        }
                    }
                }
            });
            let answers = tokio_stream::wrappers::ReceiverStream::new(rest);
            let body = Body::new(http_body_util::StreamBody::new(answers));
            std::future::ready(Ok(http::Response::new(body)))
        }
    }

    /// A request that is open, and what is there no longer when its body is dropped.
    fn watched(first: &[&[u8]]) -> (http::Request<Body>, std::sync::Weak<()>) {
        use tokio_stream::StreamExt as _;
        let alive = std::sync::Arc::new(());
        let watch = std::sync::Arc::downgrade(&alive);
        let first: Vec<_> =
            first.iter().map(|data| Ok::<_, Status>(Frame::data(Bytes::copy_from_slice(data)))).collect();
        let frames = tokio_stream::iter(first).chain(tokio_stream::pending()).map(move |frame| {
            let _ = &alive;
            frame
        });
        (http::Request::new(Body::new(http_body_util::StreamBody::new(frames))), watch)
    }

    async fn until(mut is_so: impl FnMut() -> bool) {
        let began = Instant::now();
        while !is_so() {
            assert!(began.elapsed() < 4 * REQUEST_TIME, "never");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// How the answer ended: its error is in the trailers.
    async fn ended(body: Body) -> Error {
        use http_body_util::BodyExt as _;
        let trailers = body.collect().await.unwrap().trailers().cloned().unwrap();
        Error::from(Status::from_header_map(&trailers).unwrap())
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_whose_answer_nobody_takes_is_over_in_time_and_holds_nothing_then() {
        use http_body_util::BodyExt as _;
        let _alone = ALONE.lock().await;
        let taken = || {
            let free: Vec<_> = std::iter::from_fn(|| wait_for(&PeerKey::Unknown).ok()).collect();
            WAITED_FOR_PER_PEER - free.len() as u64
        };
        let began = Instant::now();
        let (request, watch) = watched(&[&message(1), &message(2)]);
        let mut answer = Prompt::streaming(OneByOne).call(request).await.unwrap().into_body();
        assert_eq!(taken(), 1, "as long as it lasts");
        assert!(answer.frame().await.unwrap().unwrap().into_data().unwrap().starts_with(&message(1)));
        // From here on the client has no room.
        until(|| watch.strong_count() == 0).await;
        assert!(began.elapsed().abs_diff(REQUEST_TIME) < Duration::from_secs(1), "{:?}", began.elapsed());
        assert_eq!(taken(), 0);
        let error = ended(answer).await;
        assert!(error.is(CommonReason::IdleTimeout) && error.is_retryable(), "{error:?}");
        // Nor does one hold anything that its client has left.
        let (request, watch) = watched(&[&message(1), &message(2)]);
        drop(Prompt::streaming(OneByOne).call(request).await.unwrap());
        until(|| watch.strong_count() == 0 && taken() == 0).await;
    }

    #[tokio::test(start_paused = true)]
    async fn requests_beyond_what_may_wait_for_their_answers_end_the_call() {
        let _alone = ALONE.lock().await;
        let (began, more) = (Instant::now(), message(MAX_REQUEST_BYTES / 2));
        let (request, watch) = watched(&[&message(1), &message(2), &more, &more, &more]);
        let answer = Prompt::streaming(OneByOne).call(request).await.unwrap().into_body();
        until(|| watch.strong_count() == 0).await;
        assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
        let error = ended(answer).await;
        assert!(error.is(CommonReason::LimitExceeded), "{error:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_is_answered_in_full_as_its_requests_come() {
        use http_body_util::BodyExt as _;
        let _alone = ALONE.lock().await;
        let all: Vec<_> = (1..200).map(|len| message(len * 50)).collect();
        let (requests, body) = tokio::sync::mpsc::channel(1);
        let body = tokio_stream::wrappers::ReceiverStream::new(body);
        let request = http::Request::new(Body::new(http_body_util::StreamBody::new(body)));
        let mut answer = Prompt::streaming(OneByOne).call(request).await.unwrap().into_body();
        for one in &all {
            requests.send(Ok::<_, Status>(Frame::data(Bytes::from(one.clone())))).await.unwrap();
            for answered in [one.as_slice(), b"2", b"3"] {
                assert_eq!(answer.frame().await.unwrap().unwrap().into_data().unwrap(), answered);
            }
        }
        drop(requests);
        assert!(answer.frame().await.is_none());
    }
}
