//! A line of `trace.jsonl`: its keys, their order, and what must agree within it.

use super::back::Rollback;
use crate::json::Json;

/// Name and value, in the order of the config's domains.
pub type ByDomain<T> = Vec<(String, T)>;

#[derive(Clone, PartialEq, Debug)]
pub struct DomainLoss {
    pub loss: f64,
    pub tokens: u64,
}

#[derive(Clone, PartialEq, Debug)]
pub struct Decision {
    pub id: u64,
    pub line: u64,
    pub effective: u64,
    /// New weights; none for a decision that changes no weight.
    pub weights: Option<Vec<f64>>,
    /// The decision that it takes back.
    pub veto: Option<u64>,
    /// Data that enter.
    pub change: Option<Change>,
    /// Where it goes back to.
    pub rollback: Option<Rollback>,
    /// The domain of which nothing is drawn any more.
    pub limit: Option<u16>,
}

/// Domains of one data set that enter the run.
#[derive(Clone, PartialEq, Debug)]
pub struct Change {
    /// As `data.json` prints it.
    pub version: String,
    pub editions: Vec<Edition>,
}

#[derive(Clone, PartialEq, Debug)]
pub struct Edition {
    pub name: String,
    /// Its place in the run.
    pub domain: u16,
    /// Its place in the data set.
    pub index: u16,
    pub train_sequences: u64,
    pub train_tokens: u64,
    /// Not of the line: what the data set holds, once it is looked up.
    pub held_out_sequences: u64,
}

/// What a kind of decision does to samples and states.
#[derive(Default, PartialEq, Debug)]
struct Effect {
    weights: Option<Vec<f64>>,
    veto: Option<u64>,
    change: Option<Change>,
    rollback: Option<Rollback>,
    limit: Option<u16>,
}

#[derive(Clone, PartialEq, Debug)]
pub struct Line {
    pub step: u64,
    pub tokens: u64,
    pub data: [u8; 32],
    pub loss: f64,
    pub grad_norm: f64,
    pub lr: f64,
    pub mixture: ByDomain<f64>,
    pub domains: ByDomain<DomainLoss>,
    pub heldout: Option<ByDomain<DomainLoss>>,
    pub decisions: Vec<Decision>,
}

/// Keys that a line may lack, in their order; they stand behind its domains.
const OPTIONAL: [&str; 4] = ["heldout", "lane_squares", "skipped", "lineage"];

impl Line {
    /// Reads a line without its end.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let json = Json::parse(bytes)?;
        if json.print().as_bytes() != bytes {
            return Err("it is not in its shortest form".into());
        }
        let heldout = json.get("heldout").ok();
        let optional = |key: &str| OPTIONAL.contains(&key);
        let without = Json::Object(
            json.object()?
                .iter()
                .filter(|(key, _)| !optional(key))
                .cloned()
                .collect(),
        );
        let keys: Vec<&str> = json.object()?.iter().map(|(key, _)| key.as_str()).collect();
        let found: Vec<&str> = keys.iter().copied().filter(|key| optional(key)).collect();
        let in_order = OPTIONAL.iter().filter(|key| found.contains(key)).eq(&found);
        let first = keys.iter().position(|key| optional(key));
        if !in_order || first.is_some_and(|first| first != 11 || !keys[first..].starts_with(&found)) {
            return Err("what not every line has does not stand behind its domains, in its order".into());
        }
        if let Ok(squares) = json.get("lane_squares") {
            let squares = squares.float().map_err(|why| format!("lane_squares: {why}"))?;
            if squares < 0.0 {
                return Err("lane_squares is below 0".into());
            }
        }
        if json.get("skipped").is_ok_and(|skipped| *skipped != Json::Bool(true)) {
            return Err("skipped is not true".into());
        }
        if let Ok(declared) = json.get("lineage") {
            lineage(declared).map_err(|why| format!("lineage: {why}"))?;
        }
        let keys = [
            "step",
            "tokens",
            "data",
            "loss",
            "loss_bits",
            "grad_norm",
            "grad_norm_bits",
            "state",
            "lr",
            "mixture",
            "domains",
            "decisions",
        ];
        let [
            step,
            tokens,
            data,
            loss,
            loss_bits,
            norm,
            norm_bits,
            state,
            lr,
            mixture,
            domains,
            decisions,
        ] = without.exactly(keys)?;
        state.hex::<32>().map_err(|why| format!("state: {why}"))?;
        Ok(Self {
            step: step.count()?,
            tokens: tokens.count()?,
            data: data.hex().map_err(|why| format!("data: {why}"))?,
            loss: with_bits("loss", loss, loss_bits)?,
            grad_norm: with_bits("grad_norm", norm, norm_bits)?,
            lr: lr.float().map_err(|why| format!("lr: {why}"))?,
            mixture: by_domain(mixture, Json::float).map_err(|why| format!("mixture: {why}"))?,
            domains: by_domain(domains, domain_loss).map_err(|why| format!("domains: {why}"))?,
            heldout: heldout
                .map(|json| by_domain(json, domain_loss))
                .transpose()
                .map_err(|why| format!("heldout: {why}"))?,
            decisions: decisions
                .list()?
                .iter()
                .map(decision)
                .collect::<Result<_, _>>()
                .map_err(|why| format!("decisions: {why}"))?,
        })
    }
}

/// Another program goes on: who computed the lines before, and who does from here on.
fn lineage(declared: &Json) -> Result<(), String> {
    for program in declared.exactly(["from", "to"])? {
        let known: Vec<&str> = program.object()?.iter().map(|(key, _)| key.as_str()).collect();
        if !matches!(known[..], ["binary", "device"] | ["binary", "device", "libraries"]) {
            return Err("a program is its binary, its device, and libraries where there are any".into());
        }
        program.get("binary")?.text()?;
        program.get("device")?.text()?;
        if let Ok(libraries) = program.get("libraries") {
            libraries
                .list()?
                .iter()
                .try_for_each(|library| library.text().map(drop))?;
        }
    }
    Ok(())
}

/// A value that stands twice, once to read (null if it is not finite) and once as bits.
fn with_bits(key: &str, value: &Json, bits: &Json) -> Result<f64, String> {
    let digits = bits.text()?.strip_prefix("0x").filter(|digits| digits.len() == 16);
    let digits = digits.ok_or_else(|| format!("{key}_bits is not 0x and 16 digits"))?;
    let bits: [u8; 8] = crate::json::from_hex(digits)?;
    let exact = f64::from_bits(u64::from_be_bytes(bits));
    let agrees = match value {
        Json::Null => !exact.is_finite(),
        shown => shown.float().map_err(|why| format!("{key}: {why}"))?.to_bits() == exact.to_bits(),
    };
    if agrees {
        Ok(exact)
    } else {
        Err(format!(
            "{key} {} does not agree with its bits, {exact:e}",
            value.print()
        ))
    }
}

fn by_domain<T>(json: &Json, read: impl Fn(&Json) -> Result<T, String>) -> Result<ByDomain<T>, String> {
    let fields = json.object()?.iter();
    fields
        .map(|(name, value)| Ok((name.clone(), read(value).map_err(|why| format!("{name}: {why}"))?)))
        .collect()
}

fn domain_loss(json: &Json) -> Result<DomainLoss, String> {
    if let Ok([loss, tokens]) = json.exactly(["loss", "tokens"]) {
        return Ok(DomainLoss {
            loss: loss.float()?,
            tokens: tokens.count()?,
        });
    }
    let [loss, tokens, bits] = json.exactly(["loss", "tokens", "loss_bits"])?;
    let exact = with_bits("loss", loss, bits)?;
    if exact.is_finite() {
        return Err("bits of a finite loss".into());
    }
    Ok(DomainLoss {
        loss: exact,
        tokens: tokens.count()?,
    })
}

fn decision(json: &Json) -> Result<Decision, String> {
    let [id, line, effective, kind, by, reason] = json.exactly(["id", "line", "effective", "kind", "by", "reason"])?;
    reason.text()?;
    match by.object()? {
        [(who, name)] if who == "controller" || who == "person" => name.text()?,
        _ => return Err("it is neither a controller's nor a person's".into()),
    };
    let effect = effect(kind)?;
    Ok(Decision {
        id: id.count()?,
        line: line.count()?,
        effective: effective.count()?,
        weights: effect.weights,
        veto: effect.veto,
        change: effect.change,
        rollback: effect.rollback,
        limit: effect.limit,
    })
}

/// What a kind of decision does: weights that it sets, the decision that it takes back, data that enter, where it goes back to, or
/// the domain that it leaves out.
fn effect(kind: &Json) -> Result<Effect, String> {
    let floats = |json: &Json| {
        json.list()?
            .iter()
            .map(Json::float)
            .collect::<Result<Vec<f64>, String>>()
    };
    if let Json::Text(name) = kind {
        return match name.as_str() {
            "pin" | "release" | "decay" | "stop" => Ok(Effect::default()),
            other => Err(format!("'{other}' is no decision")),
        };
    }
    let [(name, body)] = kind.object()? else {
        return Err("a decision is of one kind".into());
    };
    match name.as_str() {
        "mixture" => Ok(Effect {
            weights: Some(floats(body.exactly(["weights"])?[0])?),
            ..Effect::default()
        }),
        "advice" => floats(body.exactly(["weights"])?[0]).map(|_| Effect::default()),
        "veto" => Ok(Effect {
            veto: Some(body.exactly(["decision"])?[0].count()?),
            ..Effect::default()
        }),
        "data" => {
            let [version, editions, weights] = body.exactly(["version", "domains", "weights"])?;
            let change = Change {
                version: crate::json::to_hex(&version.hex::<32>()?),
                editions: editions.list()?.iter().map(edition).collect::<Result<_, _>>()?,
            };
            Ok(Effect {
                weights: Some(floats(weights)?),
                change: Some(change),
                ..Effect::default()
            })
        }
        "learning_rate" => body.exactly(["factor"])?[0].float().map(|_| Effect::default()),
        "spike_bounds" => {
            let [expected, residual, norm] = body.exactly(["expected", "residual_loss", "grad_norm"])?;
            let known = expected.list()?.iter().filter(|loss| **loss != Json::Null);
            known
                .chain([residual, norm])
                .try_for_each(|bound| bound.float().map(|_| ()))?;
            Ok(Effect::default())
        }
        "rollback" => {
            let [to, discarded] = body.exactly(["to", "discarded"])?;
            let draws = |samples: &Json| -> Result<(u64, u64), String> {
                let [first, count] = samples.exactly(["first", "count"])?;
                Ok((first.count()?, count.count()?))
            };
            let rollback = Rollback {
                to: to.count()?,
                discarded: discarded.list()?.iter().map(draws).collect::<Result<_, _>>()?,
            };
            Ok(Effect {
                rollback: Some(rollback),
                ..Effect::default()
            })
        }
        // It decides nothing: the rollback itself comes as a decision of its own.
        "rollback_notice" => body.exactly(["to"])?[0].count().map(|_| Effect::default()),
        "epoch_limit" => Ok(Effect {
            limit: Some(place(body.exactly(["domain"])?[0])?),
            ..Effect::default()
        }),
        other => Err(format!("'{other}' is no decision")),
    }
}

/// A domain's place in the run or in a data set.
fn place(json: &Json) -> Result<u16, String> {
    u16::try_from(json.count()?).map_err(|_| "a place beyond all domains".to_owned())
}

fn edition(json: &Json) -> Result<Edition, String> {
    let [name, domain, index, language, sequences, tokens] =
        json.exactly(["name", "domain", "index", "language", "train_sequences", "train_tokens"])?;
    if !matches!(language.text()?, "en" | "zh" | "code") {
        return Err("a language that is none".into());
    }
    Ok(Edition {
        name: name.text()?.to_owned(),
        domain: place(domain)?,
        index: place(index)?,
        train_sequences: sequences.count()?,
        train_tokens: tokens.count()?,
        held_out_sequences: 0,
    })
}

#[cfg(test)]
pub mod tests {
    use super::*;

    pub fn handmade(step: u64, tokens: u64, data: &str, rest: &str) -> String {
        let zeros = "00".repeat(32);
        format!(
            r#"{{"step":{step},"tokens":{tokens},"data":"{data}","loss":2.5,"loss_bits":"0x4004000000000000","grad_norm":1.0,"grad_norm_bits":"0x3ff0000000000000","state":"{zeros}","lr":0.001,{rest}}}"#
        )
    }

    const REST: &str = r#""mixture":{"b":0.75,"a":0.25},"domains":{"b":{"loss":2.5,"tokens":64}},"heldout":{"b":{"loss":null,"tokens":1,"loss_bits":"0x7ff8000000000000"}},"decisions":[{"id":1,"line":3,"effective":9,"kind":{"mixture":{"weights":[1.0,0.0]}},"by":{"controller":"ado"},"reason":"r"},{"id":2,"line":3,"effective":9,"kind":"pin","by":{"person":"p"},"reason":""}]"#;

    #[test]
    fn a_new_lineage_names_both_programs() {
        let good = r#"{"from":{"binary":"0.1.0 aa","device":"cpu"},"to":{"binary":"0.1.0 bb","device":"cpu","libraries":["x 1"]}}"#;
        let read = |text: &str| lineage(&Json::parse(text.as_bytes()).unwrap());
        assert_eq!(read(good), Ok(()));
        for (old, new) in [
            ("\"to\"", "\"on\""),
            ("\"binary\"", "\"program\""),
            ("[\"x 1\"]", "[1]"),
            ("\"cpu\"", "1"),
        ] {
            assert!(read(&good.replacen(old, new, 1)).is_err(), "{old}");
        }
    }

    #[test]
    fn a_line_is_read_whole() {
        let line = Line::parse(handmade(3, 96, &"ab".repeat(32), REST).as_bytes()).unwrap();
        assert_eq!((line.step, line.tokens, line.data, line.loss), (3, 96, [0xab; 32], 2.5));
        assert_eq!(line.mixture, [("b".to_owned(), 0.75), ("a".to_owned(), 0.25)]);
        assert!(line.heldout.unwrap()[0].1.loss.is_nan());
        assert_eq!(line.decisions[0].weights, Some(vec![1.0, 0.0]));
        assert_eq!(line.decisions[1].weights, None);
    }

    #[test]
    fn a_change_of_the_data_is_read_whole() {
        let version = "0b".repeat(32);
        let good = format!(
            r#"{{"data":{{"version":"{version}","domains":[{{"name":"c","domain":2,"index":1,"language":"en","train_sequences":9,"train_tokens":150}}],"weights":[1.0,2.0,3.0]}}}}"#
        );
        let read = |text: &str| effect(&Json::parse(text.as_bytes()).unwrap());
        let effect = read(&good).unwrap();
        let change = effect.change.unwrap();
        assert_eq!((effect.weights, change.version), (Some(vec![1.0, 2.0, 3.0]), version));
        assert_eq!((change.editions[0].domain, change.editions[0].index), (2, 1));
        for (from, to) in [
            ("\"en\"", "\"la\""),
            (":2,", ":65536,"),
            ("0b0b", "0b0"),
            ("\"name\"", "\"nom\""),
            (",\"weights\":[1.0,2.0,3.0]", ""),
        ] {
            assert!(
                good.contains(from) && read(&good.replacen(from, to, 1)).is_err(),
                "{from}"
            );
        }
    }

    #[test]
    fn edits_are_noticed() {
        let good = handmade(3, 96, &"ab".repeat(32), REST);
        for (from, to, part) in [
            (
                "\"loss\":2.5,\"loss_bits\"",
                "\"loss\":2.6,\"loss_bits\"",
                "does not agree with its bits",
            ),
            ("0x4004", "0x4005", "does not agree with its bits"),
            (
                "\"loss\":2.5,\"loss_bits\"",
                "\"loss\":null,\"loss_bits\"",
                "does not agree",
            ),
            ("\"lr\":0.001", "\"lr\":0.00100", "shortest"),
            ("\"lr\":0.001", "\"lr\": 0.001", "shortest form"),
            ("\"step\":3,\"tokens\":96", "\"tokens\":96,\"step\":3", "its keys are"),
            ("\"pin\"", "\"pins\"", "decisions"),
            ("\"person\"", "\"nobody\"", "decisions"),
            ("abab", "ABab", "data"),
            ("\"state\":\"00", "\"state\":\"0", "state"),
            ("\"step\":3", "\"step\":-3", "no whole number"),
        ] {
            assert!(good.contains(from));
            let said = Line::parse(good.replacen(from, to, 1).as_bytes()).unwrap_err();
            assert!(said.contains(part), "{from} to {to}: {said}");
        }
        assert!(Line::parse(&good.as_bytes()[..good.len() - 1]).is_err());
    }
}
