//! The hosts of a run that has more than its controller's: who is where, and what of that can work.

use super::validate::{require, within};
use super::{ClusterConfig, ClusterTransport, Config, ConfigError};
use serde::{Deserialize, Serialize};
use std::net::IpAddr;
use std::ops::Range;

/// Bytes of a node's name.
const NAME_BYTES_MAX: usize = 64;
/// Workers of one node.
const SLOTS_MAX: u64 = 1024;
/// Nodes of one run.
const NODES_MAX: u64 = 4096;

/// `[[cluster.nodes]]`: a host whose rank processes `tarazed node` starts. It shares the run folder, the data and the program
/// with the controller's host.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeConfig {
    /// What `tarazed node --name` calls it.
    pub name: String,
    /// Where other hosts reach its ranks; `tarazed node --address` says it where it is absent, or is known only there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
    /// Workers that it has room for: the first node has workers 0 to `slots - 1`, the second the next ones.
    pub slots: u32,
}

impl NodeConfig {
    /// Whether a node can be called this: it becomes a file's name.
    #[must_use]
    pub fn is_name(text: &str) -> bool {
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        (1..=NAME_BYTES_MAX).contains(&text.len()) && text.bytes().all(is_plain) && !text.starts_with('.')
    }
}

impl ClusterConfig {
    /// Workers that the nodes have room for; none where all run on the controller's machine, which sets no limit.
    #[must_use]
    pub fn slots(&self) -> Option<u32> {
        let all = || self.nodes.iter().map(|node| node.slots);
        (!self.nodes.is_empty()).then(|| all().fold(0, u32::saturating_add))
    }

    /// The workers of the node of this number.
    #[must_use]
    pub fn workers_of(&self, node: usize) -> Range<u32> {
        let before = self.nodes.iter().take(node).map(|node| node.slots);
        let first = before.fold(0, u32::saturating_add);
        let slots = self.nodes.get(node).map_or(0, |node| node.slots);
        first..first.saturating_add(slots)
    }

    /// The number of the node that a worker is on; none where there are no nodes, or none with room for it.
    #[must_use]
    pub fn node_of(&self, worker: u32) -> Option<usize> {
        (0..self.nodes.len()).find(|&node| self.workers_of(node).contains(&worker))
    }
}

pub(super) fn check(config: &Config) -> Result<(), ConfigError> {
    let c = &config.cluster;
    let Some(slots) = c.slots() else {
        require!(
            c.address.is_none() && c.node_port == 0,
            "cluster.address",
            "or cluster.node_port is set, and there are no [[cluster.nodes]]",
            "name the nodes, or leave both out"
        );
        return Ok(());
    };
    within("cluster.nodes", c.nodes.len() as u64, 1..=NODES_MAX, "name fewer")?;
    require!(
        c.transport == ClusterTransport::Tcp,
        "cluster.transport",
        "is \"unix\", whose sockets end at one machine, and there are [[cluster.nodes]]",
        "set it to \"tcp\""
    );
    let is_reachable = |address: IpAddr| !address.is_unspecified() && !address.is_multicast();
    require!(
        c.address.is_some_and(is_reachable),
        "cluster.address",
        "names no host that nodes could dial",
        "set it to the address of the controller's host, e.g. \"10.0.0.1\""
    );
    for (index, node) in c.nodes.iter().enumerate() {
        let key = |field: &str| format!("cluster.nodes[{index}].{field}");
        let name = &node.name;
        require!(
            NodeConfig::is_name(name),
            key("name"),
            format!("'{name}' is no plain name of at most {NAME_BYTES_MAX} letters, digits, '-', '_' and '.'"),
            "choose one such as \"host-1\""
        );
        require!(
            c.nodes[..index].iter().all(|other| other.name != *name),
            key("name"),
            format!("'{name}' stands twice"),
            "give each node a name of its own"
        );
        require!(
            node.address.is_none_or(is_reachable),
            key("address"),
            "names no host that others could dial",
            "set it to the node's own address, or leave it to `tarazed node --address`"
        );
        within(
            &key("slots"),
            u64::from(node.slots),
            1..=SLOTS_MAX,
            "one for each rank and spare that the host has room for",
        )?;
    }
    let wanted = c.ranks.saturating_add(c.spares);
    require!(
        wanted <= slots,
        "cluster.ranks",
        format!(
            "{} ranks and {} spares are more than the {slots} slots of cluster.nodes",
            c.ranks, c.spares
        ),
        "add nodes or slots, or take fewer"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    const CONFIG: &str = "[run]\nname = \"tiny\"\nseed = 7\nsteps = 300\n\
        [model]\nlayers = 1\nhidden = 16\nffn = 16\nheads = 2\nkv_heads = 1\ncontext = 16\nvocabulary = 300\ninit_std = 0.02\n\
        [batch]\nlanes = 8\nsequences_per_lane = 1\nmicro_batch_sequences = 1\n\
        [optimizer]\nlearning_rate = 1e-3\nschedule = { kind = \"constant\", warmup_steps = 2 }\nblock_elements = 1024\n\
        [[data.domains]]\nname = \"web\"\npath = \"web.jsonl\"\nlanguage = \"en\"\nweight = 1\n\
        [cluster]\nranks = 4\nspares = 1\ntransport = \"tcp\"\naddress = \"10.0.0.1\"\n\
        [[cluster.nodes]]\nname = \"a\"\naddress = \"10.0.0.2\"\nslots = 2\n\
        [[cluster.nodes]]\nname = \"b-1\"\naddress = \"fd00::3\"\nslots = 3\n";

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, "run.toml", &[], Path::new("/somewhere"))
    }

    #[test]
    fn workers_follow_the_nodes_in_order() {
        let config = parse(CONFIG).expect("a good config");
        let cluster = &config.cluster;
        assert_eq!(cluster.slots(), Some(5));
        assert_eq!((cluster.workers_of(0), cluster.workers_of(1)), (0..2, 2..5));
        assert_eq!(cluster.workers_of(2), 5..5, "there is no such node");
        let nodes: Vec<Option<usize>> = (0..6).map(|worker| cluster.node_of(worker)).collect();
        assert_eq!(nodes, [Some(0), Some(0), Some(1), Some(1), Some(1), None]);
        let again = parse(&config.to_toml().expect("TOML")).expect("it reads back");
        assert_eq!(again, config);
    }

    /// DET-1: where ranks run decides no number.
    #[test]
    fn nodes_are_no_part_of_a_runs_identity() {
        let config = parse(CONFIG).expect("a good config");
        let (alone, _) = CONFIG.split_once("transport").expect("it is there");
        assert_eq!(parse(alone).expect("a good config").identity(), config.identity());
    }

    #[test]
    fn what_cannot_work_is_refused_by_its_key() {
        for (from, to, key) in [
            ("\"tcp\"", "\"unix\"", "cluster.transport"),
            ("address = \"10.0.0.1\"\n", "", "cluster.address"),
            ("10.0.0.1", "0.0.0.0", "cluster.address"),
            ("name = \"a\"", "name = \"../a\"", "cluster.nodes[0].name"),
            ("name = \"a\"", "name = \"\"", "cluster.nodes[0].name"),
            ("name = \"a\"", "name = \"b-1\"", "cluster.nodes[1].name"),
            ("fd00::3", "::", "cluster.nodes[1].address"),
            ("slots = 2", "slots = 0", "cluster.nodes[0].slots"),
            ("slots = 2", "slots = 1", "cluster.ranks"),
        ] {
            assert!(CONFIG.contains(from), "{from}");
            let refused = parse(&CONFIG.replacen(from, to, 1)).expect_err("refused");
            assert_eq!(refused.key, key, "{refused}");
        }
        let (alone, _) = CONFIG.split_once("transport").expect("it is there");
        let refused = parse(&format!("{alone}transport = \"tcp\"\nnode_port = 7000\n")).expect_err("refused");
        assert_eq!(refused.key, "cluster.address");
    }
}
