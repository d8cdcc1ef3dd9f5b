//! Every command against a running node. The expected replies are those of Redis 7.0.

use crate::support::{call, client, show, start, until};
use node::demo::client::Client;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// Runs commands and compares what is replied.
async fn replies(client: &mut Client, cases: &[(&str, &str)]) {
    for (command, expected) in cases {
        assert_eq!(call(client, command).await, *expected, "{command}");
    }
}

#[tokio::test]
async fn values_and_their_conditions() {
    let dir = tempfile::tempdir().unwrap();
    let node = start("n1", dir.path(), "0-16383").await;
    let client = &mut client(&node).await;
    replies(
        client,
        &[
            ("GET a", "nil"),
            ("SET a 1", "OK"),
            ("GET a", "1"),
            ("SET a 2 NX", "nil"),
            ("SET b 2 XX", "nil"),
            ("SET a 2 XX GET", "1"),
            ("SET b 2 NX GET", "nil"),
            ("GET b", "2"),
            ("SET a 3 NX GET", "2"),
            ("GET a", "2"),
            ("SET a 1 NX XX", "-ERR syntax error"),
            ("SET a 1 EX", "-ERR syntax error"),
            ("SET a 1 EX 0", "-ERR invalid expire time in 'set' command"),
            ("SET a 1 EX x", "-ERR value is not an integer or out of range"),
            ("SET a 1 EX 9223372036854775807", "-ERR invalid expire time in 'set' command"),
            ("SET a 1 EX 5 PX 5", "-ERR syntax error"),
            ("SET a 1 KEEPTTL EX 5", "-ERR syntax error"),
            ("SET", "-ERR wrong number of arguments for 'set' command"),
            ("SETNX a 9", ":0"),
            ("SETNX c 9", ":1"),
            ("GETSET c 8", "9"),
            ("GETDEL c", "8"),
            ("GETDEL c", "nil"),
            ("STRLEN a", ":1"),
            ("STRLEN c", ":0"),
            ("TYPE a", "string"),
            ("TYPE c", "none"),
            ("MSET {t}a 1 {t}b 2 {t}a 3", "OK"),
            ("MGET {t}a {t}b {t}c", "[3 2 nil]"),
            ("MSET {t}a 1 {t}b", "-ERR wrong number of arguments for 'mset' command"),
            ("MSET a 1 b 2", "-CROSSSLOT Keys in request don't hash to the same slot"),
            ("MGET a b", "-CROSSSLOT Keys in request don't hash to the same slot"),
            ("EXISTS {t}a {t}a {t}c", ":2"),
            ("TOUCH {t}a {t}c", ":1"),
            ("DEL {t}a {t}c", ":1"),
            ("UNLINK {t}b", ":1"),
            ("DBSIZE", ":2"),
        ],
    )
    .await;
}

#[tokio::test]
async fn counting() {
    let dir = tempfile::tempdir().unwrap();
    let node = start("n1", dir.path(), "0-16383").await;
    let client = &mut client(&node).await;
    replies(
        client,
        &[
            ("INCR n", ":1"),
            ("INCRBY n 41", ":42"),
            ("DECR n", ":41"),
            ("DECRBY n 50", ":-9"),
            ("INCRBY n x", "-ERR value is not an integer or out of range"),
            ("DECRBY n -9223372036854775808", "-ERR decrement would overflow"),
            ("SET n 9223372036854775807", "OK"),
            ("INCR n", "-ERR increment or decrement would overflow"),
            ("GET n", "9223372036854775807"),
            ("SET n 05", "OK"),
            ("INCR n", "-ERR value is not an integer or out of range"),
            ("SET n 5 EX 100", "OK"),
            ("INCR n", ":6"),
            ("TTL n", ":100"),
        ],
    )
    .await;
}

#[tokio::test]
async fn expiry() {
    let dir = tempfile::tempdir().unwrap();
    let node = start("n1", dir.path(), "0-16383").await;
    let client = &mut client(&node).await;
    replies(
        client,
        &[
            ("TTL k", ":-2"),
            ("SET k v", "OK"),
            ("TTL k", ":-1"),
            ("PTTL k", ":-1"),
            ("EXPIRE k 100", ":1"),
            ("TTL k", ":100"),
            ("EXPIRE k 50 NX", ":0"),
            ("EXPIRE k 50 GT", ":0"),
            ("EXPIRE k 50 LT", ":1"),
            ("EXPIRE k 60 XX", ":1"),
            ("TTL k", ":60"),
            ("SET k w KEEPTTL", "OK"),
            ("TTL k", ":60"),
            ("PERSIST k", ":1"),
            ("PERSIST k", ":0"),
            ("TTL k", ":-1"),
            ("EXPIRE k 50 GT", ":0"),
            ("EXPIRE k 50 LT", ":1"),
            ("SET k x", "OK"),
            ("TTL k", ":-1"),
            ("EXPIREAT k 33177117420", ":1"),
            ("EXPIRETIME k", ":33177117420"),
            ("PEXPIRETIME k", ":33177117420000"),
            ("PEXPIREAT k 33177117421999", ":1"),
            ("EXPIRETIME k", ":33177117421"),
            ("EXPIRE k 10 NX XX", "-ERR NX and XX, GT or LT options at the same time are not compatible"),
            ("EXPIRE k 10 GT LT", "-ERR GT and LT options at the same time are not compatible"),
            ("EXPIRE k 10 foo", "-ERR Unsupported option foo"),
            ("EXPIRE k 9223372036854775807", "-ERR invalid expire time in 'expire' command"),
            ("EXPIRE k -1", ":1"),
            ("EXISTS k", ":0"),
            ("EXPIRE k 10", ":0"),
            ("SETEX k 0 v", "-ERR invalid expire time in 'setex' command"),
            ("SETEX k 100 v", "OK"),
            ("SET k v PXAT 1", "OK"),
            ("GET k", "nil"),
            ("PSETEX k 40 v", "OK"),
        ],
    )
    .await;
    // Gone for readers at its time, and from the database soon after.
    until("the key has expired", async || call(client, "GET k").await == "nil").await;
    replies(client, &[("TTL k", ":-2"), ("SET k w NX", "OK"), ("DEL k", ":1")]).await;
    replies(client, &[("PSETEX l 1 v", "OK")]).await;
    until("the row is deleted", async || call(client, "DBSIZE").await == ":0").await;
}

#[tokio::test]
async fn scanning() {
    let dir = tempfile::tempdir().unwrap();
    let node = start("n1", dir.path(), "0-16383").await;
    let client = &mut client(&node).await;
    // Many slots of few keys, and one of many.
    for n in 0..500 {
        client.push(&["SET".to_owned(), format!("key:{n}"), "v".into()]).unwrap();
        client.push(&["SET".to_owned(), format!("{{tag}}:{n}"), "v".into()]).unwrap();
    }
    client.send().await.unwrap();
    for _ in 0..1000 {
        assert_eq!(show(&client.reply().await.unwrap()), "OK");
    }
    for (options, expected) in
        [("COUNT 7", 1000), ("COUNT 10000", 1000), ("MATCH key:1?? COUNT 50", 100), ("TYPE hash", 0)]
    {
        let mut cursor = "0".to_owned();
        let mut found = std::collections::BTreeSet::new();
        let mut steps = 0;
        loop {
            let reply = call(client, &format!("SCAN {cursor} {options}")).await;
            let reply = reply.strip_prefix('[').and_then(|reply| reply.strip_suffix("]]")).unwrap();
            let (next, keys) = reply.split_once(" [").unwrap();
            for key in keys.split_whitespace() {
                assert!(found.insert(key.to_owned()), "{key} came twice");
            }
            steps += 1;
            cursor = next.to_owned();
            if cursor == "0" {
                break;
            }
        }
        assert_eq!(found.len(), expected, "{options}");
        assert!(options != "COUNT 7" || steps > 40, "only {steps} steps");
    }
    replies(
        client,
        &[
            ("SCAN x", "-ERR invalid cursor"),
            ("SCAN 0 COUNT 0", "-ERR syntax error"),
            ("SCAN 0 MATCH", "-ERR syntax error"),
            (&format!("SCAN 0 MATCH {}", "*".repeat(1025)), "-ERR the pattern has more than 1024 bytes"),
            (&format!("CONFIG GET {}", "*".repeat(1025)), "-ERR the pattern has more than 1024 bytes"),
            (&format!("CONFIG GET{}", " x".repeat(65)), "-ERR more than 64 patterns"),
            ("DBSIZE", ":1000"),
        ],
    )
    .await;
}

#[tokio::test]
async fn the_connection_and_the_node() {
    let dir = tempfile::tempdir().unwrap();
    let node = start("n1", dir.path(), "0-99").await;
    let client = &mut client(&node).await;
    let port = node.addresses().resp.rsplit_once(':').unwrap().1.to_owned();
    replies(
        client,
        &[
            ("PING", "PONG"),
            ("PING a", "a"),
            ("PING a b", "-ERR wrong number of arguments for 'ping' command"),
            ("ECHO x", "x"),
            ("SELECT 0", "OK"),
            ("SELECT 1", "-ERR SELECT is not allowed in cluster mode"),
            ("CLIENT GETNAME", "nil"),
            ("CLIENT SETNAME me", "OK"),
            ("CLIENT GETNAME", "me"),
            ("CLIENT SETINFO LIB-NAME x", "OK"),
            ("CLIENT FOO", "-ERR unknown subcommand 'FOO'. Try CLIENT HELP."),
            ("HELLO 4", "-NOPROTO unsupported protocol version"),
            ("CONFIG GET save", "[save ]"),
            ("CONFIG GET appendonly", "[appendonly yes]"),
            ("CLUSTER KEYSLOT 123456789", ":12739"),
            ("CLUSTER MYID", "n1"),
            ("CLUSTER COUNTKEYSINSLOT 16384", "-ERR Invalid slot"),
            ("CLUSTER FOO", "-ERR unknown subcommand 'FOO'. Try CLUSTER HELP."),
            ("CLUSTER SLOTS", &format!("[[:0 :99 [127.0.0.1 :{port} n1 []]]]")),
            ("READONLY", "OK"),
            ("READWRITE", "OK"),
            ("ASKING", "OK"),
            ("COMMAND INFO nothing", "[nil]"),
            ("COMMAND GETKEYS MSET a 1 b 2", "[a b]"),
            ("nothing a b", "-ERR unknown command 'nothing', with args beginning with: 'a' 'b' "),
            // Slot 15495, which nobody owns.
            ("GET a", "-CLUSTERDOWN Hash slot not served"),
        ],
    )
    .await;
    let info = call(client, "INFO").await;
    for line in ["redis_version:7", "cluster_enabled:1", "role:master", "cluster_owned_slots:100"] {
        assert!(info.contains(line), "{line} is not in {info}");
    }
    assert!(call(client, "CLUSTER INFO").await.contains("cluster_state:fail"));
    assert_eq!(call(client, &format!("CLIENT SETNAME {}", "n".repeat(1024))).await, "OK");
    for command in ["CLIENT SETNAME", "HELLO 2 SETNAME"] {
        let long = format!("{command} {}", "n".repeat(1025));
        assert_eq!(call(client, &long).await, "-ERR Client names cannot have more than 1024 bytes.");
    }
    assert_eq!(call(client, "QUIT").await, "OK");
    assert!(client.reply().await.is_err(), "QUIT closes the connection");
}

/// What a raw connection answers to `input`, until it is closed or `len` bytes came.
async fn raw(address: &str, pieces: &[&[u8]], len: usize) -> String {
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    stream.set_nodelay(true).unwrap();
    for piece in pieces {
        stream.write_all(piece).await.unwrap();
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    let mut answer = vec![0; len];
    let mut got = 0;
    while got < len {
        match stream.read(&mut answer[got..]).await.unwrap() {
            0 => break,
            n => got += n,
        }
    }
    String::from_utf8_lossy(&answer[..got]).into_owned()
}

#[tokio::test]
async fn frames_at_their_edges() {
    let dir = tempfile::tempdir().unwrap();
    let node = start("n1", dir.path(), "0-16383").await;
    let address = &node.addresses().resp;
    assert_eq!(raw(address, &[b"PI", b"NG\r", b"\n"], 7).await, "+PONG\r\n");
    assert_eq!(raw(address, &[b"*1\r\n$4", b"\r\nPING", b"\r\n"], 7).await, "+PONG\r\n");
    // In one piece: pipelined, answered in order, a read sees the write before it.
    let pipeline = b"SET a 1\r\nGET a\r\nINCR a\r\nINCR a\r\nGET a\r\nFOO\r\nPING\r\n";
    let expected = "+OK\r\n$1\r\n1\r\n:2\r\n:3\r\n$1\r\n3\r\n-ERR unknown command 'FOO', with args beginning with: \r\n+PONG\r\n";
    assert_eq!(raw(address, &[pipeline], expected.len()).await, expected);
    for (input, expected) in [
        (&b"*1\r\n$-5\r\n"[..], "-ERR Protocol error: invalid bulk length\r\n"),
        (b"*x\r\n", "-ERR Protocol error: invalid multibulk length\r\n"),
        (b"*1\r\n+PING\r\n", "-ERR Protocol error: expected '$', got '+'\r\n"),
        (b"*2\r\n$3\r\nGET\r\n$536870912000\r\n", "-ERR Protocol error: invalid bulk length\r\n"),
        (b"POST / HTTP/1.1\r\nSET a 9\r\n", "-ERR this is not an HTTP server; the connection is closed\r\n"),
        (b"get 'a\r\n", "-ERR Protocol error: unbalanced quotes in request\r\n"),
    ] {
        // Longer than what is expected: the connection is closed after it.
        assert_eq!(raw(address, &[input], 1000).await, expected);
    }
    // A client that breaks the protocol does not lose what it was promised before.
    assert_eq!(
        raw(address, &[b"SET b 1\r\n*x\r\n"], 1000).await,
        "+OK\r\n-ERR Protocol error: invalid multibulk length\r\n"
    );
    // RESP3 once it is asked for.
    let hello = raw(address, &[b"HELLO 3\r\nGET nothing\r\n"], 1000);
    let hello = tokio::time::timeout(std::time::Duration::from_millis(300), hello).await;
    assert!(hello.is_err(), "the connection stays open");
    let large = vec![b'x'; 3 << 20];
    let mut client = client(&node).await;
    assert_eq!(show(&client.call(&[b"SET".as_slice(), b"large", &large]).await.unwrap()), "OK");
    assert_eq!(show(&client.call(&["GET", "large"]).await.unwrap()).len(), large.len());
}

/// What a write answers with is counted as the values of reads are.
#[tokio::test]
async fn clients_that_take_no_replies_to_writes_are_refused() {
    const CLIENTS: usize = 24;
    let dir = tempfile::tempdir().unwrap();
    let node = start("n1", dir.path(), "0-16383").await;
    let mut other = client(&node).await;
    let large = vec![b'x'; 8 << 20];
    assert_eq!(show(&other.call(&[b"SET".as_slice(), b"large", &large]).await.unwrap()), "OK");
    let (refused, answered) = ("-ERR the memory for what", "$8388608\r\nxxxxxxxxxxxxxx");
    // 64 MiB for each, 1.5 GiB in all, which they don't read.
    let many = "SET large none NX GET\r\n".repeat(8);
    let ask = async || {
        let mut reader = tokio::net::TcpStream::connect(&node.addresses().resp).await.unwrap();
        reader.write_all(many.as_bytes()).await.unwrap();
        let mut first = vec![0; refused.len()];
        reader.read_exact(&mut first).await.unwrap();
        (reader, String::from_utf8(first).unwrap())
    };
    let mut readers = Vec::new();
    let mut is_refused = false;
    for _ in 0..CLIENTS {
        let (mut reader, first) = ask().await;
        if first == refused {
            let mut rest = Vec::new();
            reader.read_to_end(&mut rest).await.unwrap();
            is_refused = true;
            break;
        }
        assert_eq!(first, answered);
        readers.push(reader);
    }
    assert!(is_refused, "what writes answer is not counted");
    assert_eq!(call(&mut other, "PING").await, "PONG");
    drop(readers);
    until("it is given back", async || ask().await.1 == answered).await;
}

#[tokio::test]
async fn a_long_list_of_names_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let node = start("n1", dir.path(), "0-16383").await;
    let mut client = client(&node).await;
    let names = format!("COMMAND INFO{}", " get".repeat(1024));
    assert!(call(&mut client, &names).await.starts_with("[[get "));
    for command in ["INFO", "DOCS"] {
        let names = format!("COMMAND {command}{}", " get".repeat(1025));
        assert_eq!(call(&mut client, &names).await, "-ERR too many command names, at most 1024 are taken");
    }
}

/// Resident memory of a node's process, in MiB.
async fn resident_mib(client: &mut Client) -> u64 {
    let info = call(client, "INFO server").await;
    let pid = info.lines().find_map(|line| line.strip_prefix("process_id:")).unwrap();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() >> 10
}

#[tokio::test]
async fn a_pipeline_of_large_values_takes_bounded_memory_and_stays_in_order() {
    const GETS: usize = 300;
    let dir = tempfile::tempdir().unwrap();
    let node = start("n1", dir.path(), "0-16383").await;
    let (mut slow, mut other) = (client(&node).await, client(&node).await);
    let large = vec![b'x'; 8 << 20];
    assert_eq!(show(&slow.call(&[b"SET".as_slice(), b"large", &large]).await.unwrap()), "OK");
    for n in 0..GETS {
        call(&mut other, &format!("SET n:{n} {n}")).await;
        slow.push(&["GET", "large"]).unwrap();
        slow.push(&["GET".to_owned(), format!("n:{n}")]).unwrap();
    }
    slow.send().await.unwrap();
    // All of them are 2.4 GiB. Others are served, while nobody reads.
    for _ in 0..20 {
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        let resident = resident_mib(&mut other).await;
        assert!(resident < 500, "{resident} MiB");
    }
    for n in 0..GETS {
        assert_eq!(show(&slow.reply().await.unwrap()).len(), large.len());
        assert_eq!(show(&slow.reply().await.unwrap()), n.to_string());
    }
    let many = vec!["large"; 40];
    let refused = call(&mut other, &format!("MGET {}", many.join(" "))).await;
    assert_eq!(refused, "-ERR the values are larger than 128 MiB together; ask for fewer keys at once");
    assert!(resident_mib(&mut other).await < 1000);
}

#[tokio::test]
async fn clients_that_hold_much_are_refused_more_while_others_are_served() {
    const CLIENTS: usize = 24;
    // What all may hold, the database's cache, and what is on its way between the two.
    const MOST: u64 = 1024 + 256 + 512;
    let dir = tempfile::tempdir().unwrap();
    let node = start("n1", dir.path(), "0-16383").await;
    let mut other = client(&node).await;
    let large = vec![b'x'; 8 << 20];
    assert_eq!(show(&other.call(&[b"SET".as_slice(), b"large", &large]).await.unwrap()), "OK");
    // 120 MiB for each, 2.8 GiB in all, which they don't read.
    let many = format!("MGET{}\r\n", " large".repeat(15));
    let (refused, answered) = ("-ERR the memory for w", "*15\r\n$8388608\r\nxxxxxx");
    let ask = async || {
        let mut reader = tokio::net::TcpStream::connect(&node.addresses().resp).await.unwrap();
        reader.write_all(many.as_bytes()).await.unwrap();
        reader
    };
    let first = async |reader: &mut tokio::net::TcpStream| {
        let mut first = vec![0; refused.len()];
        reader.read_exact(&mut first).await.unwrap();
        String::from_utf8(first).unwrap()
    };
    let mut readers = Vec::new();
    for _ in 0..CLIENTS {
        readers.push(ask().await);
    }
    // Some of those that came at once may have refused each other, so that there is room for one more.
    until("more is refused", async || {
        let mut reader = ask().await;
        let first = first(&mut reader).await;
        readers.push(reader);
        first == refused
    })
    .await;
    assert_eq!(call(&mut other, "PING").await, "PONG");
    assert!(resident_mib(&mut other).await < MOST);
    drop(readers);
    until("it is given back", async || first(&mut ask().await).await == answered).await;

    // Requests of which most is there, 1.4 GiB in all.
    let mut writers = Vec::new();
    for _ in 0..CLIENTS {
        let mut writer = tokio::net::TcpStream::connect(&node.addresses().resp).await.unwrap();
        let sending = async {
            writer.write_all(b"*2\r\n$4\r\nECHO\r\n$62914560\r\n").await?;
            for _ in 0..59 {
                writer.write_all(&large[..1 << 20]).await?;
            }
            std::io::Result::Ok(())
        };
        // One that is refused is closed while it writes.
        let sent = sending.await;
        writers.push((writer, sent.is_ok()));
        assert!(resident_mib(&mut other).await < MOST);
    }
    assert!(writers.iter().any(|(_, sent)| *sent) && writers.iter().any(|(_, sent)| !*sent));
    assert_eq!(call(&mut other, "GET none").await, "nil");
    drop(writers);
    let echo = [b"ECHO".as_slice(), &large];
    until("it is given back", async || match client(&node).await.call(&echo).await {
        Ok(reply) => show(&reply).len() == large.len(),
        Err(_) => false,
    })
    .await;
}
