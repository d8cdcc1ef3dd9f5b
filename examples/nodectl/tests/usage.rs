//! What is refused before anything is done, and help.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

mod support;

use support::nodectl;

#[tokio::test]
async fn wrong_usage_names_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    std::fs::write(dir.path().join("file"), b"x").unwrap();
    let push = format!("push {path} --to 127.0.0.1:1 --source-shard s1 --target-shard s2");
    for (args, named) in [
        (String::new(), "Usage:"),
        ("pusch".to_owned(), "push"),
        (format!("push {path}"), "--to"),
        (
            "push /no/such/path --to 127.0.0.1:1 --source-shard s1 --target-shard s2".to_owned(),
            "/no/such/path",
        ),
        ("push /dev/null --to 127.0.0.1:1 --source-shard s1 --target-shard s2".to_owned(), "neither a file"),
        (format!("{push} --slots 5-2"), "--slots"),
        (format!("{push} --slots 0-16384"), "--slots"),
        (format!("{push} --transfer-id ../x"), "--transfer-id"),
        (format!("{push} --rate 0"), "--rate"),
        (format!("{push} --retry-for soon"), "--retry-for"),
        (push.replace("127.0.0.1:1", "localhost"), "--to"),
        ("transfers".to_owned(), "--at"),
        ("transfers --at nowhere".to_owned(), "--at"),
        ("transfers --at n1:1 --timeout 0s".to_owned(), "--timeout"),
        ("progress --at n1:1".to_owned(), "<ID>"),
        ("progress a/b --at n1:1".to_owned(), "<ID>"),
        ("cancel .x --at n1:1".to_owned(), "<ID>"),
        ("migrate start --from n1:1 --slots 0-9".to_owned(), "--to"),
        ("migrate start --from n1:1 --to n2:1 --slots 0-9".to_owned(), "--to"),
        ("migrate start --from n1:1 --to a/b=n2:1 --slots 0-9".to_owned(), "--to"),
        ("migrate start --from n1:1 --to n2=nowhere --slots 0-9".to_owned(), "--to"),
        ("migrate start --from n1:1 --to n2=n2:1 --slots 9-0".to_owned(), "--slots"),
        ("migrate start --from n1:1 --to n2=n2:1".to_owned(), "--slots"),
        ("migrate start --from n1:1 --to n2=n2:1 --slots 0-9 --freeze 2m".to_owned(), "--freeze"),
        ("migrate start --from n1:1 --to n2=n2:1 --slots 0-9 --rate 0".to_owned(), "--rate"),
        ("migrate start --from n1:1 --to n2=n2:1 --slots 0-9 --id .x".to_owned(), "--id"),
        ("migrate list".to_owned(), "--at"),
        ("migrate complete m1 --at n1:1 --deadline 2h".to_owned(), "--deadline"),
        ("migrate resolve m1 --at n1:1 --reason x".to_owned(), "--commit"),
        ("migrate resolve m1 --at n1:1 --reason x --commit --discard".to_owned(), "--discard"),
        ("migrate resolve m1 --at n1:1 --commit".to_owned(), "--reason"),
        ("migrate resolve m1 --at n1:1 --commit --reason x --store-id 12".to_owned(), "--store-id"),
        ("drain n1:1".to_owned(), "--to"),
        ("drain n1:1 --to n2=n2:1 --parallel 0".to_owned(), "--parallel"),
        ("drain n1:1 --to n2=n2:1 --to n2=n2:2".to_owned(), "--to"),
        ("health".to_owned(), "<ADDR>"),
        ("health n1".to_owned(), "<ADDR>"),
        ("status".to_owned(), "<ADDR>"),
        ("status n1:1 --interval 0s".to_owned(), "--interval"),
    ] {
        let ended = nodectl(&args).await;
        assert_eq!(ended.code, Some(2), "{args}: {ended:?}");
        assert!(ended.stderr.contains(named), "{args}: {ended:?}");
        assert!(ended.stdout.is_empty(), "{args}: {ended:?}");
    }
}

#[cfg(unix)]
#[tokio::test]
async fn a_directory_that_cannot_be_a_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    let push = format!("push {path} --to 127.0.0.1:1 --source-shard s1 --target-shard s2");
    let empty = nodectl(&push).await;
    assert_eq!(empty.code, Some(2), "{empty:?}");
    assert!(empty.stderr.contains("PATH") && empty.stderr.contains("has no files"), "{empty:?}");

    std::fs::write(dir.path().join("file"), b"x").unwrap();
    for n in 0..25 {
        std::os::unix::fs::symlink("file", dir.path().join(format!("link-{n:02}"))).unwrap();
    }
    let links = nodectl(&push).await;
    assert_eq!(links.code, Some(2), "{links:?}");
    for part in ["PATH", "25 entries", "link-00: is a symbolic link", "link-19", "and 5 more"] {
        assert!(links.stderr.contains(part), "{part}: {links:?}");
    }
}

#[tokio::test]
async fn help_shows_by_example() {
    for command in [
        "",
        "push",
        "transfers",
        "progress",
        "cancel",
        "health",
        "status",
        "migrate",
        "migrate start",
        "migrate list",
        "migrate progress",
        "migrate watch",
        "migrate complete",
        "migrate cancel",
        "migrate resolve",
        "drain",
    ] {
        let help = nodectl(&format!("{command} --help")).await;
        assert_eq!(help.code, Some(0), "{command}");
        help.assert_plain();
        assert!(
            help.stdout.contains("Examples:") && help.stdout.contains(&format!("nodectl {command}")),
            "{help:?}"
        );
        let width = help.stdout.lines().map(|line| line.chars().count()).max();
        assert!(width <= Some(100), "{command}: {width:?}");
    }
    let version = nodectl("--version").await;
    assert_eq!(version.stdout, format!("nodectl {}\n", env!("CARGO_PKG_VERSION")));
    for shell in ["bash", "zsh", "fish"] {
        let script = nodectl(&format!("completions {shell}")).await;
        assert!(
            script.stdout.contains("--target-shard") || script.stdout.contains("target-shard"),
            "{shell}"
        );
    }
}
