//! What the demo found, as a table or as JSON.

use super::requests::Answer;
use comfy_table::{CellAlignment, Table, TableComponent, presets};
use serde_json::{Value, json};

pub(super) struct Row {
    pub(super) cold: Answer,
    pub(super) warm: Answer,
    /// After the server was killed and started again.
    pub(super) restarted: Option<Answer>,
}

impl Row {
    fn ratio(&self) -> f64 {
        self.cold.first_token_ms / self.warm.first_token_ms
    }

    fn identical(&self) -> bool {
        let same = |answer: &Answer| self.cold.token_ids == answer.token_ids;
        same(&self.warm) && self.restarted.as_ref().is_none_or(same)
    }
}

pub(super) struct Report {
    pub(super) model: String,
    pub(super) rows: Vec<Row>,
    /// The first prompt, computed by the prefill worker.
    pub(super) fill: Answer,
    /// The server's totals at the end.
    pub(super) stats: Value,
}

impl Report {
    /// Whether every answer had the same tokens on every way.
    pub(super) fn identical(&self) -> bool {
        self.rows.iter().all(Row::identical) && self.fill.token_ids == self.rows[0].cold.token_ids
    }

    /// How the blocks of the warm answers came; more than one if a wire failed in between.
    fn wires(&self) -> String {
        let mut wires: Vec<&str> = self.rows.iter().map(|row| row.warm.wire.as_str()).collect();
        wires.sort_unstable();
        wires.dedup();
        wires.join(", ")
    }

    fn hit_rates(&self) -> Vec<(String, f64)> {
        let asked = self.stats["asked_blocks"].as_f64().unwrap_or_default().max(1.0);
        let tiers = self.stats["tiers"].as_array().cloned().unwrap_or_default();
        let rate = |tier: &Value| {
            let name = tier["tier"].as_str().unwrap_or_default().to_owned();
            (name, tier["hit_blocks"].as_f64().unwrap_or_default() / asked)
        };
        tiers.iter().map(rate).collect()
    }

    pub(super) fn json(&self) -> Value {
        let row = |(i, row): (usize, &Row)| {
            json!({"request": i + 1, "prompt_tokens": row.warm.prompt_tokens, "cached_tokens": row.warm.cached_tokens,
                "ttft_cold_ms": row.cold.first_token_ms, "ttft_warm_ms": row.warm.first_token_ms, "ratio": row.ratio(),
                "tokens_identical": row.identical(), "loaded_bytes": row.warm.loaded_bytes, "text": row.warm.text,
                "ttft_restarted_ms": row.restarted.as_ref().map(|answer| answer.first_token_ms),
                "cached_tokens_restarted": row.restarted.as_ref().map(|answer| answer.cached_tokens)})
        };
        let rates = self.hit_rates().into_iter().map(|(tier, rate)| (tier, json!(rate)));
        json!({"model": self.model, "wire": self.wires(), "requests": self.rows.iter().enumerate().map(row).collect::<Vec<_>>(),
            "fill": {"ttft_ms": self.fill.first_token_ms, "cached_tokens": self.fill.cached_tokens,
                "loaded_bytes": self.fill.loaded_bytes},
            "tokens_identical": self.identical(), "hit_rate": rates.collect::<serde_json::Map<_, _>>(),
            "server": self.stats})
    }

    pub(super) fn print(&self) {
        let mut table = Table::new();
        let restarted = self.rows.iter().any(|row| row.restarted.is_some());
        let mut heading =
            vec!["request", "prompt tokens", "cached tokens", "TTFT cold ms", "TTFT warm ms", "ratio"];
        if restarted {
            heading.push("after kill -9 ms");
        }
        heading.extend(["tokens identical", "MiB loaded", "wire"]);
        table.load_preset(presets::UTF8_HORIZONTAL_ONLY).set_header(heading);
        // Lines above, below and under the heading; none between rows.
        table.remove_style(TableComponent::HorizontalLines).remove_style(TableComponent::MiddleIntersections);
        for (i, row) in self.rows.iter().enumerate() {
            let mut cells = vec![
                (i + 1).to_string(),
                row.warm.prompt_tokens.to_string(),
                row.warm.cached_tokens.to_string(),
                format!("{:.0}", row.cold.first_token_ms),
                format!("{:.0}", row.warm.first_token_ms),
                format!("{:.1}×", row.ratio()),
            ];
            if restarted {
                let time = |answer: &Answer| format!("{:.0}", answer.first_token_ms);
                cells.push(row.restarted.as_ref().map_or_else(String::new, time));
            }
            cells.extend([
                if row.identical() { "yes" } else { "NO" }.into(),
                mib(row.warm.loaded_bytes),
                row.warm.wire.clone(),
            ]);
            table.add_row(cells);
        }
        table.column_iter_mut().for_each(|column| column.set_cell_alignment(CellAlignment::Right));
        println!("\n{table}");
        println!(
            "cold: every cache off. warm: attention state from the cache, over {}, verified.",
            self.wires()
        );
        println!(
            "The server speaks TLS and asks for a token; shared memory is only for processes of the same user."
        );
        if restarted {
            println!(
                "after kill -9: the server was killed and started again; its blocks came back from the NVMe tier."
            );
        }
        println!(
            "The prefill worker computed the shared text once (first answer after {:.0} ms); the decode worker never did.",
            self.fill.first_token_ms
        );
        let number = |name: &str| self.stats[name].as_u64().unwrap_or_default();
        let rates: Vec<String> = self
            .hit_rates()
            .into_iter()
            .map(|(tier, rate)| format!("{tier} {:.1} %", 100.0 * rate))
            .collect();
        println!(
            "blocks asked for: {}; hit rate by tier: {}; moved: {} MiB in, {} MiB out",
            number("asked_blocks"),
            rates.join(", "),
            mib(number("published_bytes")),
            mib(number("fetched_bytes"))
        );
        println!("answer 1: {}", self.rows[0].warm.text.trim().lines().next().unwrap_or_default());
    }
}

fn mib(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / f64::from(1 << 20))
}
