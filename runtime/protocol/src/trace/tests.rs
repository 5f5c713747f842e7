use super::*;
use crate::data::decision::{DecisionAuthor, DecisionId, DecisionKind, DiscardedSamples, SpikeBounds};
use proptest::prelude::*;
use tarazed_domain::StepIndex;

fn any_bits() -> impl Strategy<Value = f64> {
    prop_oneof![
        any::<u64>().prop_map(f64::from_bits), // NaN payloads, infinities, subnormals and -0 among them
        0.0_f64..20.0,
        Just(f64::NAN),
        Just(f64::INFINITY),
        Just(-0.0),
    ]
}

fn finite_bits() -> impl Strategy<Value = f64> {
    any::<u64>()
        .prop_map(f64::from_bits)
        .prop_filter("finite", |value| value.is_finite())
}

fn names() -> impl Strategy<Value = Vec<String>> {
    prop::collection::btree_set(".{1,8}", 0..5).prop_map(|set| set.into_iter().rev().collect())
}

fn losses() -> impl Strategy<Value = DomainMap<DomainLoss>> {
    (names(), prop::collection::vec((any_bits(), any::<u64>()), 5)).prop_map(|(names, values)| {
        let losses = values.into_iter().map(|(loss, tokens)| DomainLoss { loss, tokens });
        DomainMap(names.into_iter().zip(losses).collect())
    })
}

fn decision() -> impl Strategy<Value = Decision> {
    let kind = prop_oneof![
        prop::collection::vec(finite_bits(), 0..4).prop_map(|weights| DecisionKind::Mixture { weights }),
        Just(DecisionKind::Pin),
        Just(DecisionKind::Release),
        prop::collection::vec(finite_bits(), 0..4).prop_map(|weights| DecisionKind::Advice { weights }),
        any::<u64>().prop_map(|id| DecisionKind::Veto {
            decision: DecisionId(id)
        }),
        finite_bits().prop_map(|factor| DecisionKind::LearningRate { factor }),
        Just(DecisionKind::Decay),
        Just(DecisionKind::Stop),
        any::<u64>().prop_map(|to| DecisionKind::RollbackNotice { to: StepsCompleted(to) }),
        any::<u16>().prop_map(|domain| DecisionKind::EpochLimit { domain }),
        (
            prop::collection::vec(prop::option::of(finite_bits()), 0..4),
            finite_bits(),
            finite_bits()
        )
            .prop_map(
                |(expected, residual_loss, grad_norm)| DecisionKind::SpikeBounds(SpikeBounds {
                    expected,
                    residual_loss,
                    grad_norm
                })
            ),
        (any::<u64>(), prop::collection::vec((any::<u64>(), any::<u64>()), 0..4)).prop_map(|(to, discarded)| {
            let samples = discarded
                .into_iter()
                .map(|(first, count)| DiscardedSamples { first, count });
            DecisionKind::Rollback {
                to: StepsCompleted(to),
                discarded: samples.collect(),
            }
        }),
    ];
    let by = prop_oneof![
        ".{0,6}".prop_map(DecisionAuthor::Controller),
        ".{0,6}".prop_map(DecisionAuthor::Person)
    ];
    (any::<u64>(), any::<u64>(), any::<u64>(), kind, by, ".{0,30}").prop_map(
        |(id, line, effective, kind, by, reason)| Decision {
            id: DecisionId(id),
            line: StepsCompleted(line),
            effective: StepIndex(effective),
            kind,
            by,
            reason,
        },
    )
}

fn program() -> impl Strategy<Value = Program> {
    let libraries = prop::collection::vec(".{0,4}", 0..2);
    (".{0,6}", ".{0,6}", libraries).prop_map(|(binary, device, libraries)| Program {
        binary,
        device,
        libraries,
    })
}

fn lineage() -> impl Strategy<Value = NewLineage> {
    (program(), program()).prop_map(|(from, to)| NewLineage { from, to })
}

prop_compose! {
    fn line()(
        step: u64, tokens: u64, data: [u8; 32], state: [u8; 32],
        loss in any_bits(), grad_norm in any_bits(), lr in finite_bits(),
        mixture in (names(), prop::collection::vec(finite_bits(), 5)),
        domains in losses(), heldout in prop::option::of(losses()),
        lane_squares in prop::option::of(finite_bits()), skipped: bool, lineage in prop::option::of(lineage()),
        decisions in prop::collection::vec(decision(), 0..3),
    ) -> TraceLine {
        let mixture = DomainMap(mixture.0.into_iter().zip(mixture.1).collect());
        TraceLine { step: StepsCompleted(step), tokens, data, loss, grad_norm, state, lr, mixture, domains, heldout, lane_squares, skipped, lineage, decisions }
    }
}

fn sample(step: u64) -> TraceLine {
    TraceLine {
        step: StepsCompleted(step),
        tokens: 8192 * step,
        data: [0xab; 32],
        loss: 5.25,
        grad_norm: 1.5,
        state: [0xcd; 32],
        lr: 3e-4,
        mixture: DomainMap(vec![("web".into(), 0.75), ("code".into(), 0.25)]),
        domains: DomainMap(vec![(
            "web".into(),
            DomainLoss {
                loss: 5.25,
                tokens: 8192,
            },
        )]),
        heldout: None,
        lane_squares: None,
        skipped: false,
        lineage: None,
        decisions: Vec::new(),
    }
}

fn text(steps: std::ops::RangeInclusive<u64>) -> String {
    steps.map(|step| sample(step).print() + "\n").collect()
}

proptest! {
    /// parse(print(x)) is x, bit for bit, and the text is canonical.
    #[test]
    fn lines_round_trip_bit_for_bit(line in line()) {
        let text = line.print();
        prop_assert!(!text.contains('\n'));
        let again = TraceLine::parse(&text, 1).unwrap();
        prop_assert_eq!(&again, &line);
        prop_assert_eq!(again.print(), text);
        let bytes = rkyv::to_bytes::<rkyv::rancor::Error>(&line).unwrap();
        prop_assert_eq!(rkyv::from_bytes::<TraceLine, rkyv::rancor::Error>(&bytes).unwrap(), line);
    }

    /// A file cut anywhere keeps its whole lines and says where they end; a cut at a line end is no damage.
    #[test]
    fn a_torn_last_line_is_recognised(cut in 0_usize..1500) {
        let whole = text(1..=4);
        let bytes = &whole.as_bytes()[..cut.min(whole.len())];
        let count = bytes.iter().filter(|byte| **byte == b'\n').count();
        let (lines, whole_bytes) = parse_whole_lines(bytes).unwrap();
        prop_assert_eq!(lines.len(), count);
        let last_end = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        prop_assert_eq!(whole_bytes, last_end);
        match parse_lines(bytes) {
            Ok(all) => prop_assert!(all.len() == count && last_end == bytes.len()),
            Err(e) => {
                prop_assert_eq!(e, TraceError::Torn { line_number: count + 1, whole_bytes: last_end });
                prop_assert!(last_end < bytes.len());
            }
        }
    }

    /// No text makes the reader panic.
    #[test]
    fn any_bytes_are_answered(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _answer = parse_lines(&bytes);
    }
}

/// The keys and their order are a contract with outsiders.
#[test]
fn the_text_is_pinned() {
    let hex_data = "ab".repeat(32);
    let hex_state = "cd".repeat(32);
    let head = format!(
        r#"{{"step":2,"tokens":16384,"data":"{hex_data}","loss":5.25,"loss_bits":"0x4015000000000000","grad_norm":1.5,"grad_norm_bits":"0x3ff8000000000000","state":"{hex_state}","lr":0.0003,"mixture":{{"web":0.75,"code":0.25}},"domains":{{"web":{{"loss":5.25,"tokens":8192}}}}"#
    );
    let mut line = sample(2);
    assert_eq!(line.print(), format!(r#"{head},"decisions":[]}}"#));
    let loss = DomainLoss {
        loss: f64::NEG_INFINITY,
        tokens: 3,
    };
    line.heldout = Some(DomainMap(vec![("code".into(), loss)]));
    line.decisions = vec![crate::data::tests::mixture_decision(1, 2, 9, &[0.5, 0.5])];
    let heldout = r#""heldout":{"code":{"loss":null,"tokens":3,"loss_bits":"0xfff0000000000000"}}"#;
    let decision = r#"{"id":1,"line":2,"effective":9,"kind":{"mixture":{"weights":[0.5,0.5]}},"by":{"person":"ada"},"reason":"a test"}"#;
    assert_eq!(line.print(), format!(r#"{head},{heldout},"decisions":[{decision}]}}"#));
    (line.lane_squares, line.skipped) = (Some(0.5), true);
    assert_eq!(
        line.print(),
        format!(r#"{head},{heldout},"lane_squares":0.5,"skipped":true,"decisions":[{decision}]}}"#)
    );
    line.loss = f64::NAN;
    assert!(line.print().contains(r#""loss":null,"loss_bits":"0x7ff8000000000000""#));
}

#[test]
fn damage_is_named_with_its_line() {
    let cause = |change: &dyn Fn(&str) -> String| {
        let mut lines: Vec<String> = text(1..=3).lines().map(str::to_owned).collect();
        lines[1] = change(&lines[1]);
        match parse_lines((lines.join("\n") + "\n").as_bytes()) {
            Err(TraceError::Malformed { line_number: 2, cause }) => cause,
            other => panic!("{other:?}"),
        }
    };
    assert!(cause(&|line| line[..40].to_owned()).contains("EOF"));
    assert!(cause(&|line| line.replace("5.25,\"loss_bits", "5.26,\"loss_bits")).contains("disagrees with loss_bits"));
    assert!(cause(&|line| line.replace("5.25,\"loss_bits", "null,\"loss_bits")).contains("disagrees with loss_bits"));
    assert!(cause(&|line| line.replace("0x4015", "4015")).contains("hex digits"));
    assert!(cause(&|line| line.replace("\"state\":\"cd", "\"state\":\"")).contains("64 hex digits"));
    assert!(cause(&|line| line.replace("\"lr\"", "\"rate\"")).contains("rate"));
    assert!(cause(&|line| line.replace("\"loss\":5.25,\"loss_bits", "\"loss_bits")).contains("loss"));
    assert!(cause(&|line| line.replace("\"code\":", "\"web\":")).contains("stands twice"));
    let skipped = text(1..=2) + &text(4..=4);
    assert_eq!(
        parse_lines(skipped.as_bytes()),
        Err(TraceError::OutOfOrder {
            line_number: 3,
            expected: StepsCompleted(3),
            found: StepsCompleted(4)
        })
    );
}

/// STEP-5: a difference of one bit in any field is found, and step and field are named.
#[test]
fn differences_name_step_and_field() {
    let change = |change: &dyn Fn(&mut TraceLine)| {
        let a: Vec<TraceLine> = (1..=5).map(sample).collect();
        let mut b: Vec<TraceLine> = (3..=8).map(sample).collect();
        change(&mut b[1]);
        diff(&a, &b)
    };
    assert_eq!(
        change(&|_| ()),
        Comparison {
            common_steps: 3,
            first: None
        }
    );
    let next = |value: &mut f64| *value = f64::from_bits(value.to_bits() + 1);
    type Change<'a> = (&'a str, &'a dyn Fn(&mut TraceLine));
    let changes: [Change<'_>; 13] = [
        ("tokens", &|line| line.tokens += 1),
        ("data", &|line| line.data[31] ^= 1),
        ("loss", &|line| next(&mut line.loss)),
        ("grad_norm", &|line| next(&mut line.grad_norm)),
        ("state", &|line| line.state[0] ^= 128),
        ("lr", &|line| next(&mut line.lr)),
        ("mixture.code", &|line| next(&mut line.mixture.0[1].1)),
        ("domains.web", &|line| line.domains.0[0].1.tokens += 1),
        ("domains", &|line| line.domains.0[0].0 = "code".into()),
        ("heldout", &|line| line.heldout = Some(DomainMap::default())),
        ("lane_squares", &|line| line.lane_squares = Some(0.0)),
        ("skipped", &|line| line.skipped = true),
        ("decisions", &|line| {
            line.decisions = vec![crate::data::tests::mixture_decision(1, 4, 9, &[1.0])]
        }),
    ];
    for (field, apply) in changes {
        let first = change(apply)
            .first
            .unwrap_or_else(|| panic!("{field} was not compared"));
        assert_eq!((first.step, first.field.as_str()), (StepsCompleted(4), field));
        assert!(first.to_string().starts_with("step 4: "), "{first}");
    }
    assert_eq!(diff(&[sample(1)], &[sample(2)]).common_steps, 0);
    let mut nan = sample(1);
    nan.loss = f64::NAN;
    assert_eq!(diff(&[nan.clone()], &[nan]).first, None, "the same NaN is the same");
}

/// DET-4: who computed a line is said in it, stays in the text, and is no difference; the newest declaration counts.
#[test]
fn a_new_lineage_is_declared_and_not_compared() {
    let program = |build: &str| Program {
        binary: build.to_owned(),
        device: "cpu".to_owned(),
        libraries: Vec::new(),
    };
    let declares = |step: u64, from: &str, to: &str| TraceLine {
        lineage: Some(NewLineage {
            from: program(from),
            to: program(to),
        }),
        ..sample(step)
    };
    let line = declares(3, "a", "b");
    assert_eq!(line.first_difference(&sample(3)), None);
    let text = line.print();
    assert!(
        text.contains(
            r#""lineage":{"from":{"binary":"a","device":"cpu"},"to":{"binary":"b","device":"cpu"}},"decisions""#
        ),
        "{text}"
    );
    assert_eq!(TraceLine::parse(&text, 1).unwrap().lineage, line.lineage);
    let lines = [sample(2), line, sample(4), declares(5, "b", "c"), sample(6)];
    let writer = |count: usize, base: u64, checkpoint: Option<(&str, Option<(&str, &str)>)>| {
        let found = |(from, to)| NewLineage {
            from: program(from),
            to: program(to),
        };
        let checkpoint = checkpoint.map(|(maker, change)| (program(maker), change.map(found)));
        writer_of(&lines[..count], StepsCompleted(base), checkpoint).map(|program| program.binary)
    };
    // Behind the checkpoint the trace says it; else its maker wrote the end, too.
    assert_eq!(writer(5, 2, Some(("a", None))).as_deref(), Some("c"));
    assert_eq!(writer(3, 2, Some(("a", None))).as_deref(), Some("b"));
    assert_eq!(writer(1, 2, Some(("a", None))).as_deref(), Some("a"));
    assert_eq!(
        writer(3, 4, Some(("b", Some(("a", "b"))))).as_deref(),
        Some("b"),
        "it stands in line 3"
    );
    // A checkpoint that was made while the lines of another were replayed.
    assert_eq!(writer(1, 1, Some(("b", Some(("a", "b"))))).as_deref(), Some("a"));
    assert_eq!(writer(3, 4, Some(("c", Some(("b", "c"))))).as_deref(), Some("b"));
    // Without a checkpoint the trace alone is asked.
    assert_eq!(writer(4, 0, None).as_deref(), Some("c"));
    assert_eq!(writer(1, 0, None), None);
}
