//! What a bad disk does to a node while slots and snapshots move, with real processes: damage does no harm, or is told with the name of the
//! file; slots that it leaves in doubt are refused with that reason, and the rest is served.

use crate::support;
use std::collections::BTreeMap;
use std::fs;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::support::migration::{ID, Pair, Slow, begin, limits, reaches, request, resolve};
use crate::support::{call, client, fill, start, until};
use node::demo::processes::NodeProcess;
use proto::common::ids::{NodeId, ShardId, TransferId};
use proto::common::slots::SlotRange;
use proto::common::v1::Priority;
use proto::migration::journal::Journal;
use proto::node::health_service_client::HealthServiceClient;
use proto::node::{Direction, HealthCheckRequest, HealthStatus, MigrationDecision, MigrationState};
use proto::snapshot::sender::{SenderOptions, SnapshotSender, SnapshotToSend};
use proto::snapshot::source::FileSource;
use proto::snapshot::spec::SnapshotPoint;
use redb::{ReadableDatabase as _, ReadableTable as _, TableDefinition};

/// How a file is damaged: its new content.
fn damages(content: &[u8], offsets: impl IntoIterator<Item = usize>) -> Vec<(String, Vec<u8>)> {
    let flips = offsets.into_iter().filter(|&at| at < content.len()).map(|at| {
        let mut flipped = content.to_vec();
        flipped[at] ^= 1 << (at % 8);
        (format!("a bit of byte {at} flipped"), flipped)
    });
    let cuts = [0, content.len() / 2, content.len() - 1];
    let cuts = cuts.map(|len| (format!("cut to {len} bytes"), content[..len].to_vec()));
    flips.chain(cuts).collect()
}

/// What the node logs from now on.
struct Log {
    path: PathBuf,
    from: usize,
}

impl Log {
    fn of(node: &NodeProcess) -> Self {
        let from = fs::read_to_string(node.log()).unwrap().len();
        Self { path: node.log(), from }
    }

    fn text(&self) -> String {
        fs::read_to_string(&self.path).unwrap().split_off(self.from)
    }
}

/// What the component `quarantine` of a node says, which is degraded.
async fn quarantine(node: &NodeProcess) -> String {
    let endpoint = proto::common::tuning::endpoint(&node.addresses().grpc).unwrap();
    let mut health = HealthServiceClient::new(endpoint.connect().await.unwrap());
    let asked = HealthCheckRequest { service: "quarantine".to_owned(), ..Default::default() };
    let report = health.health_check(asked).await.unwrap().into_inner().health.unwrap();
    assert_eq!(report.status(), HealthStatus::Degraded, "{report:?}");
    format!("{report:?}")
}

/// A migration that copies, slowly, with both nodes stopped.
async fn copying() -> Pair {
    let mut pair = Pair::start(3000, 500).await;
    let mut asked = request(ID, &pair.n2);
    asked.limits = limits(Slow::Copying);
    begin(&pair.n1, asked).await.unwrap();
    until("rows are staged", async || {
        let shown = support::migration::progress(&pair.n2, ID, Direction::In).await;
        shown.and_then(|shown| shown.progress).is_some_and(|progress| progress.items_done > 20)
    })
    .await;
    pair.n1.stop().await.unwrap();
    pair.n2.stop().await.unwrap();
    pair
}

/// The source copies on, from where it was.
async fn goes_on(pair: &Pair) {
    until("the source goes on", async || {
        let Some(shown) = support::migration::progress(&pair.n1, ID, Direction::Out).await else {
            return false;
        };
        assert_eq!((shown.state(), shown.copy), (MigrationState::Copying, 1), "{shown:?}");
        shown.connected && shown.progress.is_some_and(|progress| progress.items_done > 20)
    })
    .await;
}

#[tokio::test]
async fn a_damaged_record_of_a_source_quarantines_its_slots_and_the_rest_is_served() {
    let mut pair = copying().await;
    pair.n2.restart().await.unwrap();
    let name = format!("08192-16383.{ID}.task");
    let record = pair.directory.path().join("n1/migrations/active").join(&name);
    let whole = fs::read(&record).unwrap();
    for (how, content) in damages(&whole, [0, 5, 9, 20, whole.len() - 1]) {
        fs::write(&record, content).unwrap();
        let log = Log::of(&pair.n1);
        pair.n1.restart().await.unwrap();
        assert!(log.text().contains(&name), "{how}: {}", log.text());
        let mut redis = client(&pair.n1).await;
        // `foo` is in slot 12182, `bar` in 5061.
        for command in ["GET foo", "SET foo 1"] {
            let refused = call(&mut redis, command).await;
            let reason =
                format!("-CLUSTERDOWN slot 12182 is quarantined because of the damaged record {name}");
            assert_eq!(refused, reason, "{how}");
        }
        assert_eq!(call(&mut redis, "SET bar 1").await, "OK", "{how}");
        let refused = begin(&pair.n1, request("other", &pair.n2)).await.unwrap_err();
        assert_eq!(refused.reason(), "SLOTS_QUARANTINED", "{how}: {refused:?}");
        // Of the server's paths, the file's name alone.
        assert!(refused.message().contains(&name), "{how}: {refused:?}");
        assert!(!format!("{refused:?}").contains('/'), "{how}: {refused:?}");
        let shown = quarantine(&pair.n1).await;
        assert!(shown.contains(&name) && !shown.contains('/'), "{how}: {shown}");
        pair.n1.stop().await.unwrap();
    }
    // The control: the record as it was is gone on with. What the target had is not copied again.
    fs::write(&record, &whole).unwrap();
    pair.n1.restart().await.unwrap();
    goes_on(&pair).await;
    assert_eq!(call(&mut client(&pair.n1).await, "GET foo").await, "nil");

    // A damaged history is told, and keeps nobody from anything.
    support::migration::cancel(&pair.n1, ID).await.unwrap();
    reaches(&pair.n1, ID, Direction::Out, MigrationState::Cancelled).await;
    let history = pair.directory.path().join("n1/migrations/history");
    until("the end is in the history", async || fs::metadata(&history).is_ok_and(|file| file.len() > 0))
        .await;
    pair.n1.stop().await.unwrap();
    let whole = fs::read(&history).unwrap();
    for (how, content) in damages(&whole, [3, 9, whole.len() / 2]) {
        fs::write(&history, &content).unwrap();
        let log = Log::of(&pair.n1);
        pair.n1.restart().await.unwrap();
        assert!(content.is_empty() || log.text().contains("history"), "{how}: {}", log.text());
        assert_eq!(call(&mut client(&pair.n1).await, "GET foo").await, "nil", "{how}");
        pair.n1.stop().await.unwrap();
    }
}

/// Everything in a database that a node believes.
fn dump(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let database = redb::Database::open(directory.join("node.redb")).unwrap();
    let txn = database.begin_read().unwrap();
    let mut all = BTreeMap::new();
    for entry in txn.open_table(TableDefinition::<&[u8], &[u8]>::new("rows")).unwrap().iter().unwrap() {
        let (key, row) = entry.unwrap();
        all.insert(format!("row {:?}", key.value()), row.value().to_vec());
    }
    for entry in txn.open_table(TableDefinition::<u16, &[u8]>::new("ownership")).unwrap().iter().unwrap() {
        let (slot, claim) = entry.unwrap();
        all.insert(format!("claim {}", slot.value()), claim.value().to_vec());
    }
    let migrations = TableDefinition::<&str, (u32, u16, u16, u64, u64, &[u8])>::new("migrations");
    for entry in txn.open_table(migrations).unwrap().iter().unwrap() {
        let (id, row) = entry.unwrap();
        let (generation, start, end, keys, bytes, record) = row.value();
        all.insert(format!("{} {generation} {start} {end} {keys} {bytes}", id.value()), record.to_vec());
    }
    all
}

/// Damages the database of a stopped node in many ways: it starts with all that it had, or says which file is damaged.
async fn damage_database(node: &mut NodeProcess, directory: &Path) -> (usize, usize) {
    let file = directory.join("node.redb");
    let whole = fs::read(&file).unwrap();
    let believed = dump(directory);
    // Opening it has written to it.
    fs::write(&file, &whole).unwrap();
    let spread = (0..16).map(|part| whole.len() / 16 * part + 77 * part);
    let (mut harmless, mut told) = (0, 0);
    for (how, content) in damages(&whole, [0, 9, 12, 64, 70, 200].into_iter().chain(spread)) {
        fs::write(&file, &content).unwrap();
        let log = Log::of(node);
        if node.restart().await.is_ok() {
            node.kill().await.unwrap();
            assert_eq!(dump(directory), believed, "{how}: the node serves something else");
            harmless += 1;
        } else {
            let said = log.text();
            assert!(said.contains("node.redb is damaged"), "{how}: {said}");
            told += 1;
        }
    }
    fs::write(&file, &whole).unwrap();
    (harmless, told)
}

#[tokio::test]
async fn a_damaged_database_is_never_served() {
    let mut pair = copying().await;
    let (one, two) = (pair.directory.path().join("n1"), pair.directory.path().join("n2"));
    for (node, directory) in [(&mut pair.n1, &one), (&mut pair.n2, &two)] {
        let (harmless, told) = damage_database(node, directory).await;
        println!("{}: {harmless} harmless, {told} told", node.id());
        assert!(told >= 5, "{}: a cut of the database must be found", node.id());
    }
    // Without its database, the rest of the directory makes no node.
    fs::rename(one.join("node.redb"), one.join("aside")).unwrap();
    let log = Log::of(&pair.n1);
    pair.n1.restart().await.unwrap_err();
    assert!(log.text().contains("node.redb is damaged: it is missing"), "{}", log.text());
    fs::rename(one.join("aside"), one.join("node.redb")).unwrap();

    // The control: undamaged, the migration goes on where it was.
    pair.n2.restart().await.unwrap();
    pair.n1.restart().await.unwrap();
    goes_on(&pair).await;

    // A node whose database cannot be restored comes back without it, and an operator decides of its migrations.
    pair.n2.stop().await.unwrap();
    let whole = fs::read(two.join("node.redb")).unwrap();
    fs::write(two.join("node.redb"), &whole[..whole.len() / 2]).unwrap();
    let log = Log::of(&pair.n2);
    pair.n2.restart().await.unwrap_err();
    assert!(
        log.text().contains("node.redb is damaged") && log.text().contains("start the node anew"),
        "{}",
        log.text()
    );
    let (well, _, said) = check(&two, &[]).await;
    assert!(!well && said.contains("node.redb is damaged"), "{said}");
    fs::rename(&two, pair.directory.path().join("aside")).unwrap();
    pair.n2.restart().await.unwrap();
    let stopped = reaches(&pair.n1, ID, Direction::Out, MigrationState::NeedsOperator).await;
    resolve(&pair.n1, &stopped, MigrationDecision::Discarded).await.unwrap();
    begin(&pair.n1, request("again", &pair.n2)).await.unwrap();
    reaches(&pair.n1, "again", Direction::Out, MigrationState::Completed).await;
    assert_eq!(call(&mut client(&pair.n2).await, "SET foo 1").await, "OK");
}

/// Cuts the last byte off the record of a migration to the stopped node whose data is in `directory`.
fn damage_target_record(directory: &Path) {
    let table = TableDefinition::<&str, (u32, u16, u16, u64, u64, &[u8])>::new("migrations");
    let database = redb::Database::open(directory.join("node.redb")).unwrap();
    let txn = database.begin_write().unwrap();
    {
        let mut migrations = txn.open_table(table).unwrap();
        let (generation, start, end, keys, bytes, record) = migrations
            .get(ID)
            .unwrap()
            .map(|row| {
                let (generation, start, end, keys, bytes, record) = row.value();
                (generation, start, end, keys, bytes, record.to_vec())
            })
            .unwrap();
        migrations.insert(ID, (generation, start, end, keys, bytes, &record[..record.len() - 1])).unwrap();
    }
    txn.commit().unwrap();
}

#[tokio::test]
async fn a_damaged_record_of_a_target_keeps_its_slots_from_others() {
    let mut pair = copying().await;
    damage_target_record(&pair.directory.path().join("n2"));
    let log = Log::of(&pair.n2);
    pair.n2.restart().await.unwrap();
    assert!(log.text().contains("cannot be trusted") && log.text().contains("8192-16383"), "{}", log.text());
    let shown = quarantine(&pair.n2).await;
    assert!(
        shown.contains(&format!(
            "slots 8192-16383 are not moved because of the damaged record of migration {ID}"
        )),
        "{shown}"
    );
    pair.n1.restart().await.unwrap();
    until("the source is refused", async || {
        let shown = support::migration::progress(&pair.n1, ID, Direction::Out).await;
        shown.and_then(|shown| shown.progress?.error).is_some_and(|error| error.reason == "SLOTS_QUARANTINED")
    })
    .await;
    // The source goes on serving, and the target takes other slots.
    assert_eq!(call(&mut client(&pair.n1).await, "SET foo 1").await, "OK");
    let mut low = request("low", &pair.n2);
    low.spec.as_mut().unwrap().slots = Some("0-99".parse::<SlotRange>().unwrap().into());
    begin(&pair.n1, low).await.unwrap();
    reaches(&pair.n1, "low", Direction::Out, MigrationState::Completed).await;
}

/// What `node check` says of the data of a stopped node, and whether it ends well.
async fn check(data: &Path, arguments: &[&str]) -> (bool, String, String) {
    let mut command = tokio::process::Command::new(support::program());
    let command = command.arg("check").arg("--data").arg(data).args(arguments).kill_on_drop(true);
    let ended = tokio::time::timeout(Duration::from_secs(60), command.output()).await.unwrap().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (ended.status.success(), text(ended.stdout), text(ended.stderr))
}

async fn check_json(data: &Path, arguments: &[&str]) -> (bool, serde_json::Value) {
    let (well, said, _) = check(data, &[arguments, &["--json"]].concat()).await;
    (well, serde_json::from_str(&said).unwrap_or_else(|_| panic!("{said}")))
}

#[tokio::test]
async fn a_damaged_record_of_a_target_is_dropped_by_command_and_the_source_copies_again() {
    let mut pair = copying().await;
    let data = pair.directory.path().join("n2");
    let (well, whole) = check_json(&data, &[]).await;
    assert!(well, "{whole}");
    let record = &whole["records"][0];
    assert_eq!((&record["record"], &record["side"]), (&ID.into(), &"target".into()), "{whole}");
    let slots = serde_json::json!(["8192-16383"]);
    assert_eq!((&record["slots"], &record["state"]), (&slots, &"RECEIVING".into()), "{whole}");
    let (well, _, said) = check(&data, &["--drop", ID]).await;
    assert!(!well && said.contains("can be read") && said.contains("nodectl migrate cancel"), "{said}");

    damage_target_record(&data);
    let (well, damaged) = check_json(&data, &[]).await;
    let record = &damaged["records"][0];
    assert!(!well && record["state"].is_null(), "{damaged}");
    assert!(record["problem"].as_str().is_some_and(|problem| problem.starts_with("says ")), "{damaged}");
    let staged = record["staged_keys"].as_u64().unwrap();
    assert!(staged > 20, "{damaged}");
    let (well, said, _) = check(&data, &[]).await;
    let command = format!("node check --data {} --drop {ID}", data.display());
    assert!(!well && said.contains("DAMAGED") && said.contains(&command), "{said}");
    let (well, _, said) = check(&data, &["--drop", "other"]).await;
    assert!(!well && said.contains("there is no record \"other\""), "{said}");
    // A node that runs is left alone.
    pair.n2.restart().await.unwrap();
    let (well, _, said) = check(&data, &["--drop", ID]).await;
    assert!(!well && said.contains("in use"), "{said}");
    pair.n1.restart().await.unwrap();
    until("the source is refused", async || {
        let shown = support::migration::progress(&pair.n1, ID, Direction::Out).await;
        shown.and_then(|shown| shown.progress?.error).is_some_and(|error| error.reason == "SLOTS_QUARANTINED")
    })
    .await;
    pair.n2.stop().await.unwrap();

    let (well, dropped) = check_json(&data, &["--drop", ID]).await;
    assert!(well, "{dropped}");
    assert_eq!(
        (&dropped["records"], &dropped["dropped"]["staged_keys"]),
        (&serde_json::json!([]), &staged.into())
    );
    let kept = PathBuf::from(dropped["dropped"]["kept_as"].as_str().unwrap());
    assert!(fs::metadata(&kept).unwrap().len() > 0, "{dropped}");
    let log = Log::of(&pair.n2);
    pair.n2.restart().await.unwrap();
    assert!(!log.text().contains("cannot be trusted"), "{}", log.text());
    // Nothing was lost: the source copies again, and hands over.
    until("the source takes the limit off", async || begin(&pair.n1, request(ID, &pair.n2)).await.is_ok())
        .await;
    reaches(&pair.n1, ID, Direction::Out, MigrationState::Completed).await;
    // `foo` is in slot 12182.
    assert_eq!(call(&mut client(&pair.n2).await, "SET foo 1").await, "OK");
}

#[tokio::test]
async fn a_damaged_record_of_a_source_is_dropped_by_command_once_the_target_has_discarded_it() {
    let mut pair = copying().await;
    pair.n2.restart().await.unwrap();
    let data = pair.directory.path().join("n1");
    let name = format!("active/08192-16383.{ID}.task");
    let record = data.join("migrations").join(&name);
    let whole = fs::read(&record).unwrap();
    fs::write(&record, &whole[..whole.len() - 1]).unwrap();
    let (well, damaged) = check_json(&data, &[]).await;
    let shown = &damaged["records"][0];
    assert!(!well && shown["problem"].is_string() && shown["owned"] == true, "{damaged}");
    assert_eq!((&shown["record"], &shown["migration_id"]), (&name.as_str().into(), &ID.into()), "{damaged}");
    // Both could serve the slots if the target had taken them over.
    let (well, _, said) = check(&data, &["--drop", &name]).await;
    assert!(
        !well && said.contains("--target-discarded") && said.contains("nodectl migrate cancel"),
        "{said}"
    );
    assert!(record.exists());
    support::migration::cancel(&pair.n2, ID).await.unwrap();
    let (well, said, _) = check(&data, &["--drop", &name, "--target-discarded"]).await;
    assert!(well && said.contains(&format!("dropped {name}")), "{said}");
    assert!(!record.exists());
    assert_eq!(
        fs::read(data.join(format!("migrations/dropped/08192-16383.{ID}.task"))).unwrap().len(),
        whole.len() - 1
    );
    // The slots are served again, and can be moved.
    pair.n1.restart().await.unwrap();
    assert_eq!(call(&mut client(&pair.n1).await, "SET foo 1").await, "OK");
    begin(&pair.n1, request("again", &pair.n2)).await.unwrap();
    reaches(&pair.n1, "again", Direction::Out, MigrationState::Completed).await;
}

/// A file that does not tell what it is keeps nobody from anything, and is not dropped lightly.
#[tokio::test]
async fn a_file_that_nobody_can_place_may_be_of_any_slots() {
    let pair = copying().await;
    let data = pair.directory.path().join("n1");
    let active = data.join("migrations/active");
    for name in ["notes.txt", ".swp", "\u{1b}[31m.task"] {
        fs::write(active.join(name), b"of an editor").unwrap();
        let (well, shown) = check_json(&data, &[]).await;
        let records = shown["records"].as_array().unwrap();
        let [sound, other] = records.as_slice() else { panic!("{shown}") };
        assert!(!well && sound["problem"].is_null(), "{shown}");
        assert_eq!(
            (&other["owned"], &other["slots"]),
            (&serde_json::Value::Null, &serde_json::json!([])),
            "{shown}"
        );
        let shown = other["record"].as_str().unwrap();
        let (well, _, said) = check(&data, &["--drop", shown]).await;
        assert!(!well && said.contains("may own slots") && said.contains("move it"), "{said}");
        assert!(active.join(name).exists());
        let (well, _, said) = check(&data, &["--drop", shown, "--target-discarded"]).await;
        assert!(well && !active.join(name).exists(), "{said}");
    }
    // A node that owns nothing cannot own slots of it: no word of the target is needed.
    let other = pair.directory.path().join("n2");
    fs::create_dir_all(other.join("migrations/active")).unwrap();
    fs::write(other.join("migrations/active/notes.txt"), b"of an editor").unwrap();
    let (well, _, said) = check(&other, &["--drop", "active/notes.txt"]).await;
    assert!(well, "{said}");
}

/// Whether the slots of a migration have gone over, nobody knows without its record; the log that the database keeps for it tells which they are.
#[tokio::test]
async fn a_record_that_is_gone_quarantines_its_slots_and_is_dropped_by_command() {
    let mut pair = copying().await;
    pair.n2.restart().await.unwrap();
    let data = pair.directory.path().join("n1");
    let name = format!("active/08192-16383.{ID}.task");
    let record = data.join("migrations").join(&name);
    let whole = fs::read(&record).unwrap();
    fs::remove_file(&record).unwrap();
    pair.n1.restart().await.unwrap();
    let mut redis = client(&pair.n1).await;
    let refused = call(&mut redis, "GET foo").await;
    assert_eq!(
        refused,
        format!("-CLUSTERDOWN slot 12182 is quarantined because of the missing record 08192-16383.{ID}.task")
    );
    assert_eq!(call(&mut redis, "SET bar 1").await, "OK");
    drop(redis);
    pair.n1.stop().await.unwrap();
    let (well, said, _) = check(&data, &[]).await;
    assert!(!well && said.contains("MISSING") && said.contains("nodectl migrate cancel"), "{said}");
    let (well, _, said) = check(&data, &["--drop", &name]).await;
    assert!(!well && said.contains("--target-discarded"), "{said}");

    // Restored, it is gone on with.
    fs::write(&record, &whole).unwrap();
    assert!(check(&data, &[]).await.0);
    pair.n1.restart().await.unwrap();
    goes_on(&pair).await;
    pair.n1.stop().await.unwrap();

    fs::remove_file(&record).unwrap();
    support::migration::cancel(&pair.n2, ID).await.unwrap();
    let (well, dropped) = check_json(&data, &["--drop", &name, "--target-discarded"]).await;
    assert!(well && dropped["dropped"]["kept_as"].is_null(), "{dropped}");
    pair.n1.restart().await.unwrap();
    assert_eq!(call(&mut client(&pair.n1).await, "SET foo 1").await, "OK");
    begin(&pair.n1, request("again", &pair.n2)).await.unwrap();
    reaches(&pair.n1, "again", Direction::Out, MigrationState::Completed).await;
}

/// What a node quarantines, `node check` shows and drops.
#[tokio::test]
async fn a_record_of_a_source_that_decodes_and_cannot_be_gone_on_with_is_shown_and_dropped() {
    let mut pair = copying().await;
    pair.n2.restart().await.unwrap();
    let data = pair.directory.path().join("n1");
    let name = format!("active/08192-16383.{ID}.task");
    let (journal, recovered) = Journal::open(data.join("migrations"), 10).unwrap();
    let (id, mut record) = recovered.active.into_iter().next().unwrap();
    record.progress.as_mut().unwrap().spec.as_mut().unwrap().value_format =
        "Rows of another version".to_owned();
    journal.save(&id, support::migration::slots(), &record).await.unwrap();
    pair.n1.restart().await.unwrap();
    let refused = call(&mut client(&pair.n1).await, "GET foo").await;
    assert_eq!(
        refused,
        format!("-CLUSTERDOWN slot 12182 is quarantined because of the damaged record 08192-16383.{ID}.task")
    );
    pair.n1.stop().await.unwrap();
    let (well, shown) = check_json(&data, &[]).await;
    let record = &shown["records"][0];
    assert!(!well && record["problem"].as_str().is_some_and(|text| text.contains("value_format")), "{shown}");
    assert!(record["advice"].as_str().is_some_and(|text| text.contains("another version")), "{shown}");
    support::migration::cancel(&pair.n2, ID).await.unwrap();
    let (well, _, said) = check(&data, &["--drop", &name, "--target-discarded"]).await;
    assert!(well, "{said}");
    pair.n1.restart().await.unwrap();
    assert_eq!(call(&mut client(&pair.n1).await, "SET foo 1").await, "OK");
}

/// A record that is whole and in the way of nobody but a damaged one is not dropped with it.
#[tokio::test]
async fn a_whole_record_that_waits_for_a_damaged_one_is_not_dropped() {
    let pair = copying().await;
    let data = pair.directory.path().join("n1");
    let active = data.join("migrations/active");
    fs::write(active.join("16000-16383.other.task"), b"damaged").unwrap();
    let held = format!("active/08192-16383.{ID}.task");
    let (well, said, _) = check(&data, &[]).await;
    assert!(!well && said.contains("HELD") && said.contains("the file is whole"), "{said}");
    let (well, _, said) = check(&data, &["--drop", &held, "--target-discarded"]).await;
    assert!(!well && said.contains("is not damaged"), "{said}");
    let (well, _, said) =
        check(&data, &["--drop", "active/16000-16383.other.task", "--target-discarded"]).await;
    assert!(well, "{said}");
    let (_, shown) = check_json(&data, &[]).await;
    assert_eq!(shown["records"][0]["record"], held.as_str(), "{shown}");
}

#[tokio::test]
async fn a_directory_that_is_no_node_s_is_not_made_one() {
    let empty = tempfile::tempdir().unwrap();
    let (well, _, said) = check(empty.path(), &[]).await;
    assert!(!well && said.contains("there is no node.redb in it"), "{said}");
    assert_eq!(fs::read_dir(empty.path()).unwrap().count(), 0);
}

fn snapshot(node: &str) -> SnapshotToSend {
    SnapshotToSend {
        transfer_id: TransferId::new("t").unwrap(),
        source_shard: ShardId::new("s1").unwrap(),
        target_shard: ShardId::new("s2").unwrap(),
        source_node: NodeId::new("n9").unwrap(),
        target_node: Some(NodeId::new(node).unwrap()),
        slots: SlotRange::new(100, 200).unwrap(),
        point: SnapshotPoint { term: 1, index: 1 },
        fence: None,
        priority: Priority::Split,
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        if from.is_dir() {
            copy(&from, &to);
        } else {
            fs::copy(from, to).unwrap();
        }
    }
}

fn files(below: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(below).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found.sort();
    found
}

#[tokio::test]
async fn a_snapshot_half_received_survives_damage_or_names_it() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    let content: Vec<u8> = (0..12_u32 << 20).map(|at| u8::try_from(at * 31 % 251).unwrap()).collect();
    fs::write(&file, &content).unwrap();
    let mut node = start("n1", directory.path(), "0-16383").await;
    fill(&node, 10, 10).await;
    let mut slow = SenderOptions::default();
    slow.bytes_per_second = NonZeroU64::new(4 << 20);
    let endpoint = proto::common::tuning::endpoint(&node.addresses().grpc).unwrap();
    let mut handle = SnapshotSender::new(endpoint.clone())
        .options(slow)
        .send(snapshot("n1"), FileSource::new(&file))
        .unwrap();
    until("some of it is durable", async || {
        let progress = handle.progress().and_then(|shown| shown.progress);
        progress.is_some_and(|progress| progress.bytes_done >= 4 << 20)
    })
    .await;
    node.kill().await.unwrap();
    handle.cancel();
    drop(handle.join().await);

    let (store, kept) = (directory.path().join("n1/snapshots"), directory.path().join("kept"));
    copy(&store, &kept);
    let area = kept.join("staging/t");
    let names: Vec<_> =
        files(&area).iter().map(|path| path.strip_prefix(&kept).unwrap().to_owned()).collect();
    assert!(names.len() >= 4, "{names:?}");
    let mut told = 0;
    for name in names {
        let whole = fs::read(kept.join(&name)).unwrap();
        if whole.is_empty() {
            continue;
        }
        for (how, damaged) in damages(&whole, [whole.len() / 3, 100]) {
            fs::remove_dir_all(&store).unwrap();
            copy(&kept, &store);
            fs::write(store.join(&name), damaged).unwrap();
            let what = format!("{}: {how}", name.display());
            let log = Log::of(&node);
            node.restart().await.unwrap();
            assert_eq!(call(&mut client(&node).await, "GET key:1").await, "0000000001", "{what}");
            let sender = SnapshotSender::new(endpoint.clone());
            let mut handle = sender.send(snapshot("n1"), FileSource::new(&file)).unwrap();
            let sent = tokio::time::timeout(Duration::from_secs(60), handle.join()).await.expect(&what);
            if let Err(error) = sent {
                panic!("{what}: {error:?}; {}", log.text());
            }
            let installed: Vec<_> = files(&store.join("installed/s2/t"));
            assert_eq!(installed.len(), 1, "{what}: {installed:?}");
            assert!(fs::read(&installed[0]).unwrap() == content, "{what}: other content was installed");
            told += usize::from(log.text().contains("staging/t"));
            node.kill().await.unwrap();
        }
    }
    assert!(told > 0, "no damage was told");
}
