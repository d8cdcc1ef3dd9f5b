//! What was measured: kept as JSON, shown as a table.

use serde::{Deserialize, Serialize};

use crate::process::{Sample, median};
use crate::side::Usage;

/// All of a run.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Report {
    /// CPU, cores, kernel.
    pub machine: String,
    pub rows: Vec<Row>,
    pub resume: Vec<Resume>,
    pub crowd: Option<CrowdRow>,
}

/// One way of moving bytes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Row {
    /// What is moved from where to where.
    pub case: String,
    /// By whom.
    pub peer: String,
    pub bytes: u64,
    pub chunk: usize,
    pub files: u64,
    pub lanes: u32,
    /// Of each round.
    pub samples: Vec<Sample>,
    /// Why there are none.
    pub skipped: Option<String>,
}

/// From the call that resumes to the first new byte.
#[derive(Debug, Serialize, Deserialize)]
pub struct Resume {
    pub store: String,
    pub bytes: u64,
    pub files: u64,
    pub percent: u64,
    pub seconds: Vec<f64>,
}

/// Many transfers at once.
#[derive(Debug, Serialize, Deserialize)]
pub struct CrowdRow {
    pub transfers: usize,
    /// Of each.
    pub bytes: u64,
    pub seconds: f64,
    pub sender: Usage,
    pub receiver: Usage,
    /// Bytes of the last and the first of them when half of all had been sent, or all of one.
    pub slowest: u64,
    pub fastest: u64,
}

const GIB: f64 = (1_u64 << 30) as f64;
const MIB: f64 = (1_u64 << 20) as f64;

impl Row {
    fn gib(&self) -> f64 {
        self.bytes as f64 / GIB
    }

    /// GiB/s, the median of the rounds.
    pub fn rate(&self) -> Option<f64> {
        median(self.samples.iter().map(|sample| self.gib() / sample.seconds).collect())
    }

    fn cpu_per_gib(&self) -> Option<f64> {
        median(self.samples.iter().map(|sample| sample.cpu_s / self.gib()).collect())
    }

    /// How many times as fast as `other`, round by round: least, median, most.
    fn ratio(&self, other: &Self) -> Option<[f64; 3]> {
        let mut ratios: Vec<f64> = (self.samples.iter().zip(&other.samples))
            .map(|(own, other)| other.seconds / own.seconds)
            .collect();
        ratios.sort_by(f64::total_cmp);
        Some([*ratios.first()?, median(ratios.clone())?, *ratios.last()?])
    }

    fn peak(&self, of: impl Fn(&Sample) -> Option<Usage>) -> Option<f64> {
        let grown = |usage: Usage| usage.peak_rss.saturating_sub(usage.idle_rss) as f64 / MIB;
        self.samples.iter().filter_map(|sample| of(sample).map(grown)).max_by(f64::total_cmp)
    }
}

impl Report {
    /// As Markdown, which reads well as it is.
    pub fn table(&self) -> String {
        let mut text = format!("{}\n", self.machine);
        let mut case = "";
        for row in &self.rows {
            if row.case != case {
                case = &row.case;
                text += &format!("\n**{case}**\n\n");
                text += "| | GiB/s | proto is | in single rounds | CPU s/GiB | proto takes | sender MiB | receiver MiB |\n";
                text += "|---|--:|--:|--:|--:|--:|--:|--:|\n";
            }
            if let Some(why) = &row.skipped {
                text += &format!("| {} | skipped: {why} |\n", row.name());
                continue;
            }
            let ours = self.rows.iter().find(|ours| {
                ours.case == row.case && ours.peer == "proto" && ours.variant() == row.variant()
            });
            let ours = ours.filter(|_| row.peer != "proto");
            let ratio = ours.and_then(|ours| ours.ratio(row));
            let taken = ours.and_then(|ours| Some(ours.cpu_per_gib()? / row.cpu_per_gib()?));
            let (ratio, rounds) = match ratio {
                Some([least, middle, most]) => (format!("{middle:.2} x"), format!("{least:.2} to {most:.2}")),
                None => (String::new(), String::new()),
            };
            let cells = [
                number(row.rate(), 2),
                ratio,
                rounds,
                number(row.cpu_per_gib(), 2),
                taken.map_or_else(String::new, |taken| format!("{taken:.2} x")),
                number(row.peak(|sample| sample.sender), 0),
                number(row.peak(|sample| sample.receiver), 0),
            ];
            text += &format!("| {} | {} |\n", row.name(), cells.join(" | "));
        }
        if !self.resume.is_empty() {
            text += "\n**Resume: from the call to the first new byte**\n\n| receiver | size | files | at | ms |\n";
            text += "|---|--:|--:|--:|--:|\n";
        }
        for Resume { store, bytes, files, percent, seconds } in &self.resume {
            let ms = number(median(seconds.clone()).map(|seconds| seconds * 1e3), 1);
            text += &format!("| {store} | {:.1} GiB | {files} | {percent} % | {ms} |\n", *bytes as f64 / GIB);
        }
        if let Some(crowd) = &self.crowd {
            let CrowdRow { transfers, bytes, seconds, sender, receiver, slowest, fastest } = crowd;
            let rate = *transfers as f64 * *bytes as f64 / GIB / seconds;
            text += &format!(
                "\n**{transfers} transfers of {:.0} MiB at once**: {rate:.2} GiB/s; resident at most {:.0} MiB at the sender, {:.0} MiB \
                 at the receiver; the fastest is {:.2} times as fast as the slowest\n",
                *bytes as f64 / MIB,
                sender.peak_rss as f64 / MIB,
                receiver.peak_rss as f64 / MIB,
                *fastest as f64 / (*slowest).max(1) as f64,
            );
        }
        text
    }
}

impl Row {
    fn variant(&self) -> (u64, u64) {
        (self.bytes, self.files)
    }

    fn name(&self) -> String {
        let mut name = self.peer.clone();
        if self.lanes > 1 {
            name += &format!(", {} lanes", self.lanes);
        }
        if self.case.starts_with("sweep") {
            name += &format!(", chunks of {} KiB, {} files", self.chunk >> 10, self.files);
        }
        name
    }
}

fn number(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(String::new, |value| format!("{value:.digits$}"))
}
