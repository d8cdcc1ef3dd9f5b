//! The detector beside a fixed timeout: how long until a death is seen, and how often a living peer is suspected.
//!
//! Heartbeats leave every 500 ms and arrive in order, as on one connection: one that is late holds up those behind it. A heartbeat that
//! is lost never comes. Delays are drawn as they were measured in the field, in shape: see [`Network`].

use std::time::Duration;

use proto_health::client::{Detector, DetectorOptions, MonitorOptions};

use crate::check::percentile;

const HEARTBEAT: f64 = 0.5;
const RULES: [Rule; 10] = [
    Rule::Phi(3.0),
    Rule::Phi(5.0),
    Rule::Phi(8.0),
    Rule::Phi(12.0),
    Rule::Dead,
    Rule::Timeout(1.0),
    Rule::Timeout(1.2),
    Rule::Timeout(1.5),
    Rule::Timeout(2.0),
    Rule::Timeout(3.0),
];
/// Of so many heartbeats, one is the last: what follows is a death to be seen.
const DEATH_EVERY: usize = 97;

/// What delays and loses heartbeats. Times in seconds.
#[derive(Clone, Copy)]
struct Network {
    name: &'static str,
    /// Mean and deviation of a normal delay.
    normal: (f64, f64),
    /// Shape and scale of a Pareto delay that comes on top, as of queues in a shared network.
    tail: Option<(f64, f64)>,
    /// Every so many seconds on average the sender stands still, for a time between the two, as in a full garbage collection.
    pauses: Option<(f64, f64, f64)>,
    /// Part that is lost.
    loss: f64,
}

const LAN: (f64, f64) = (0.002, 0.0005);

const NETWORKS: [Network; 5] = [
    Network { name: "normal, 20 ms +- 10 ms", normal: (0.02, 0.01), tail: None, pauses: None, loss: 0.0 },
    Network {
        name: "heavy tail (Pareto 1.5)",
        normal: LAN,
        tail: Some((1.5, 0.01)),
        pauses: None,
        loss: 0.0,
    },
    Network {
        name: "pauses of 0.3-2 s per min",
        normal: LAN,
        tail: None,
        pauses: Some((60.0, 0.3, 2.0)),
        loss: 0.0,
    },
    Network { name: "1 % loss", normal: LAN, tail: None, pauses: None, loss: 0.01 },
    Network { name: "10 % loss", normal: LAN, tail: None, pauses: None, loss: 0.1 },
];

fn normal(random: &mut fastrand::Rng) -> f64 {
    // Box-Muller.
    let (a, b) = (1.0 - random.f64(), random.f64());
    (-2.0 * a.ln()).sqrt() * (std::f64::consts::TAU * b).cos()
}

impl Network {
    /// When each heartbeat leaves, and when it arrives; `None` is lost.
    fn row(&self, count: usize, random: &mut fastrand::Rng) -> Vec<(f64, Option<f64>)> {
        let (mut behind, mut last) = (0.0_f64, 0.0_f64);
        let mut row = Vec::with_capacity(count);
        for n in 0..count {
            let due = n as f64 * HEARTBEAT;
            if let Some((every, least, most)) = self.pauses
                && random.f64() < HEARTBEAT / every
            {
                behind = behind.max(due + least + random.f64() * (most - least));
            }
            let sent = due.max(behind);
            let mut delay = (self.normal.0 + self.normal.1 * normal(random)).max(0.000_1);
            if let Some((shape, scale)) = self.tail {
                delay += scale * ((1.0 - random.f64()).powf(-1.0 / shape) - 1.0);
            }
            if random.f64() < self.loss {
                row.push((sent, None));
                continue;
            }
            last = last.max(sent + delay);
            row.push((sent, Some(last)));
        }
        row
    }
}

/// When a silence becomes a verdict.
#[derive(Clone, Copy)]
enum Rule {
    /// A suspicion of so much; 8 is where a peer is SUSPECT by default.
    Phi(f64),
    /// As a peer is DEAD by default: suspicion and silence.
    Dead,
    /// A silence of so many seconds.
    Timeout(f64),
}

impl Rule {
    fn name(self) -> String {
        let options = MonitorOptions::default();
        match self {
            Self::Phi(phi) => format!("phi {phi}"),
            Self::Dead => format!("phi {} and {:?}", options.dead_phi, options.dead_after),
            Self::Timeout(time) => format!("timeout {time} s"),
        }
    }

    /// Whether a silence that ended with an arrival was one.
    fn is_met(self, phi: f64, silence: f64) -> bool {
        match self {
            Self::Phi(bound) => phi >= bound,
            Self::Dead => {
                let options = MonitorOptions::default();
                phi >= options.dead_phi && silence >= options.dead_after.as_secs_f64()
            }
            Self::Timeout(bound) => silence >= bound,
        }
    }

    /// After which silence it is one.
    fn silence(self, detector: &Detector, last: f64) -> f64 {
        match self {
            Self::Phi(phi) => silence_for(detector, last, phi),
            Self::Dead => {
                let options = MonitorOptions::default();
                silence_for(detector, last, options.dead_phi).max(options.dead_after.as_secs_f64())
            }
            Self::Timeout(time) => time,
        }
    }
}

/// What one rule did on one network.
struct Judged {
    rule: Rule,
    wrong: u64,
    /// Seconds from the death to the suspicion.
    seen_after: Vec<f64>,
}

fn seconds(time: f64) -> Duration {
    Duration::from_secs_f64(time)
}

/// Silence after which the suspicion reaches `phi`.
fn silence_for(detector: &Detector, last: f64, phi: f64) -> f64 {
    let (mut low, mut high) = (0.0, 60.0);
    while high - low > 0.000_5 {
        let middle = (low + high) / 2.0;
        if detector.phi(seconds(last + middle)).is_some_and(|now| now >= phi) {
            high = middle
        } else {
            low = middle
        }
    }
    high
}

fn judge(network: &Network, count: usize) -> ([Judged; RULES.len()], f64) {
    // The same network for everybody, and in each run.
    let mut random = fastrand::Rng::with_seed(7);
    let row = network.row(count, &mut random);
    let mut judged = RULES.map(|rule| Judged { rule, wrong: 0, seen_after: Vec::new() });
    let mut detector = Detector::new(DetectorOptions::default());
    let (mut last, mut hours) = (0.0, 0.0);
    for (n, (sent, arrived)) in row.iter().enumerate() {
        let Some(arrived) = *arrived else { continue };
        if let Some(phi) = detector.phi(seconds(arrived)) {
            let silence = arrived - last;
            for one in &mut judged {
                one.wrong += u64::from(one.rule.is_met(phi, silence));
            }
            hours += silence / 3600.0;
        }
        detector.heartbeat(seconds(arrived));
        last = arrived;
        if n % DEATH_EVERY == 0 && detector.phi(seconds(arrived)).is_some() {
            // It dies at some time before the next heartbeat is due.
            let died = sent + random.f64() * HEARTBEAT;
            for one in &mut judged {
                one.seen_after.push(last + one.rule.silence(&detector, last) - died);
            }
        }
    }
    (judged, hours)
}

pub(crate) fn run(quick: bool) {
    let count = if quick { 10_000 } else { 1_000_000 };
    println!(
        "\nDetector: a heartbeat every 500 ms, {count} of them for each network; window and floors as by default"
    );
    for network in &NETWORKS {
        let (judged, hours) = judge(network, count);
        println!("\n{:<28} {:>16} {:>14} {:>14}", network.name, "wrong per hour", "seen after", "p99");
        for mut one in judged {
            one.seen_after.sort_by(f64::total_cmp);
            let mean = one.seen_after.iter().sum::<f64>() / one.seen_after.len() as f64;
            println!(
                "  {:<26} {:>16.3} {:>12.2} s {:>12.2} s",
                one.rule.name(),
                one.wrong as f64 / hours,
                mean,
                percentile(&one.seen_after, 99.0)
            );
        }
    }
}
