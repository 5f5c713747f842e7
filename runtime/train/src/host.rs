//! The way of device memory to other ranks: through the host, which is what a data plane of sockets needs, or as it lies, where
//! the data plane has a way for it ([`Collective::device_plane`]).
//!
//! Through the host, elements travel in full precision: a receiver rounds them to its buffer's precision, as the update that
//! made them does. As it lies, memory of full precision travels in full, and working weights as the sender's update rounded
//! them, which is how the receiver would: **no bit depends on the way.**

use crate::StepError;
use std::borrow::Cow;
use std::ops::Range;
use tarazed_domain::Rank;
use tarazed_fabric::{Collective, DeviceReceive, DeviceSend, Receive, Send, Tag};
use tarazed_kernels::cuda::driver::Driver;
use tarazed_kernels::cuda::table::Element;
use tarazed_kernels::cuda::{CudaBuffer, CudaDevice, CudaStream};
use tarazed_kernels::{CpuBuffer, CpuDevice, CpuStream, Device, DeviceError, View, ViewMut};

/// Where elements are to arrive: ranges of a buffer, ascending and apart.
pub struct Target<'a, D: Device> {
    /// The buffer.
    pub buffer: &'a mut D::Buffer,
    /// Elements to fill.
    pub ranges: Vec<Range<usize>>,
}

/// What leaves: elements of a buffer of full precision, to some ranks.
pub struct Leaving<'a, D: Device> {
    /// To whom.
    pub to: Vec<Rank>,
    /// What it is.
    pub tag: Tag,
    /// The buffer.
    pub buffer: &'a D::Buffer,
    /// Elements of it.
    pub range: Range<usize>,
}

/// What arrives.
#[derive(Clone, Copy, Debug)]
pub struct Arriving {
    /// From whom.
    pub from: Rank,
    /// What it must be.
    pub tag: Tag,
    /// The place of its range among those of all targets, in their order.
    pub range: usize,
}

/// What travels within one buffer that is laid out alike on all ranks.
#[derive(Clone, Debug)]
pub struct Shared {
    /// Who has it.
    pub from: Rank,
    /// Who wants it; the own rank in what arrives.
    pub to: Vec<Rank>,
    /// What it is.
    pub tag: Tag,
    /// Elements, on both sides.
    pub range: Range<usize>,
}

/// A device whose memory a host can read and fill: in place where it is host memory, through copies where it is not.
pub trait HostVisible: Device {
    /// Elements on the host, when all that the stream was asked for is done.
    ///
    /// # Errors
    /// As [`Device::download`].
    fn outgoing<'a>(
        &self,
        stream: &mut Self::Stream,
        buffer: &'a Self::Buffer,
        range: Range<usize>,
    ) -> Result<Cow<'a, [f32]>, DeviceError>;

    /// Lets `arrive` fill slices, one for each range of each target in order; on return they are in their buffers, for any
    /// stream. Nothing of a target counts if `arrive` fails.
    ///
    /// # Errors
    /// Those of `arrive`; as [`Device::upload`].
    fn receive<E: From<DeviceError>>(
        &self,
        stream: &mut Self::Stream,
        targets: Vec<Target<'_, Self>>,
        arrive: impl FnOnce(Vec<&mut [f32]>) -> Result<(), E>,
    ) -> Result<(), E>
    where
        Self: Sized;

    /// Sends what is leaving while what is arriving goes into the targets' ranges. What two ranks have for each other is in the
    /// same order on both. Nothing of a target counts if this fails.
    ///
    /// # Errors
    /// As [`Collective::exchange`] and [`HostVisible::receive`].
    fn exchange(
        &self,
        stream: &mut Self::Stream,
        fabric: &mut dyn Collective,
        leaving: &[Leaving<'_, Self>],
        arriving: &[Arriving],
        targets: Vec<Target<'_, Self>>,
    ) -> Result<(), StepError>
    where
        Self: Sized,
    {
        through_host(self, stream, fabric, leaving, arriving, targets)
    }

    /// Sends parts of a buffer while other parts of it arrive, as they are stored, where the data plane has a way for device
    /// memory; else does nothing and says so. The answer is the same on all ranks.
    ///
    /// # Errors
    /// As [`HostVisible::exchange`].
    fn exchange_stored(
        &self,
        _stream: &mut Self::Stream,
        _fabric: &mut dyn Collective,
        _buffer: &mut Self::Buffer,
        _leaving: &[Shared],
        _arriving: &[Shared],
    ) -> Result<bool, StepError> {
        Ok(false)
    }

    /// Copies of whole buffers whose last work is done, made beside whatever other streams do: a snapshot.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`] of host memory; as [`Device::download`].
    fn copies<const N: usize>(&self, buffers: [&Self::Buffer; N]) -> Result<[CpuBuffer; N], DeviceError>;
}

/// [`HostVisible::exchange`] over any data plane.
fn through_host<D: HostVisible>(
    device: &D,
    stream: &mut D::Stream,
    fabric: &mut dyn Collective,
    leaving: &[Leaving<'_, D>],
    arriving: &[Arriving],
    targets: Vec<Target<'_, D>>,
) -> Result<(), StepError> {
    let elements = leaving.iter().map(|part| match part.to.is_empty() {
        true => Ok(Cow::Borrowed(&[][..])),
        false => device.outgoing(stream, part.buffer, part.range.clone()),
    });
    let elements = elements.collect::<Result<Vec<_>, DeviceError>>()?;
    let sends: Vec<Send<'_>> = leaving
        .iter()
        .zip(&elements)
        .flat_map(|(part, elements)| {
            let (tag, bytes) = (part.tag, bytemuck::cast_slice(elements));
            part.to.iter().map(move |&to| Send { to, tag, bytes })
        })
        .collect();
    device.receive(stream, targets, |slices| {
        let mut slices: Vec<Option<&mut [f32]>> = slices.into_iter().map(Some).collect();
        let mut receives: Vec<Receive<'_>> = Vec::with_capacity(arriving.len());
        for part in arriving {
            let Some(elements) = slices[part.range].take() else {
                panic!("two messages for one range of a target")
            };
            receives.push(Receive {
                from: part.from,
                tag: part.tag,
                bytes: bytemuck::cast_slice_mut(elements),
            });
        }
        Ok(fabric.exchange(&sends, &mut receives)?)
    })
}

/// Consecutive parts of a slice.
fn cut<'a>(elements: &'a mut [f32], ranges: &[Range<usize>]) -> Vec<&'a mut [f32]> {
    let (mut rest, mut at) = (elements, 0);
    let mut parts = Vec::with_capacity(ranges.len());
    for range in ranges {
        let (_, behind) = std::mem::take(&mut rest).split_at_mut(range.start - at);
        let (part, behind) = behind.split_at_mut(range.len());
        parts.push(part);
        (rest, at) = (behind, range.end);
    }
    parts
}

/// All buffers' copies, or the first error.
fn all<const N: usize>(
    copy: impl FnMut(usize) -> Result<CpuBuffer, DeviceError>,
) -> Result<[CpuBuffer; N], DeviceError> {
    let copies = (0..N).map(copy).collect::<Result<Vec<_>, _>>()?;
    Ok(<[CpuBuffer; N]>::try_from(copies).unwrap_or_else(|_| unreachable!("one copy for each buffer")))
}

impl HostVisible for CpuDevice {
    fn outgoing<'a>(
        &self,
        _: &mut CpuStream,
        buffer: &'a CpuBuffer,
        range: Range<usize>,
    ) -> Result<Cow<'a, [f32]>, DeviceError> {
        Ok(Cow::Borrowed(&buffer[range]))
    }

    fn receive<E: From<DeviceError>>(
        &self,
        _: &mut CpuStream,
        targets: Vec<Target<'_, Self>>,
        arrive: impl FnOnce(Vec<&mut [f32]>) -> Result<(), E>,
    ) -> Result<(), E> {
        let slices = targets
            .into_iter()
            .flat_map(|target| cut(target.buffer, &target.ranges));
        arrive(slices.collect())
    }

    fn copies<const N: usize>(&self, buffers: [&CpuBuffer; N]) -> Result<[CpuBuffer; N], DeviceError> {
        all(|index| CpuBuffer::from_slice(buffers[index]))
    }
}

impl<R: Driver> HostVisible for CudaDevice<R> {
    fn outgoing<'a>(
        &self,
        stream: &mut CudaStream<R>,
        buffer: &'a CudaBuffer<R>,
        range: Range<usize>,
    ) -> Result<Cow<'a, [f32]>, DeviceError> {
        let mut elements = vec![0.0; range.len()];
        self.download(stream, View::at(buffer, range.start), &mut elements)?;
        Ok(Cow::Owned(elements))
    }

    fn receive<E: From<DeviceError>>(
        &self,
        stream: &mut CudaStream<R>,
        targets: Vec<Target<'_, Self>>,
        arrive: impl FnOnce(Vec<&mut [f32]>) -> Result<(), E>,
    ) -> Result<(), E> {
        let ranges = targets.iter().flat_map(|target| &target.ranges);
        let mut staged: Vec<Vec<f32>> = ranges.map(|range| vec![0.0; range.len()]).collect();
        arrive(staged.iter_mut().map(Vec::as_mut_slice).collect())?;
        let mut staged = staged.iter();
        for target in targets {
            for (range, elements) in target.ranges.iter().zip(staged.by_ref()) {
                self.upload(stream, elements, ViewMut::at(target.buffer, range.start))?;
            }
        }
        self.synchronize(stream)?;
        Ok(())
    }

    fn exchange(
        &self,
        stream: &mut CudaStream<R>,
        fabric: &mut dyn Collective,
        leaving: &[Leaving<'_, Self>],
        arriving: &[Arriving],
        targets: Vec<Target<'_, Self>>,
    ) -> Result<(), StepError> {
        let Some(plane) = fabric.device_plane() else {
            return through_host(self, stream, fabric, leaving, arriving, targets);
        };
        // What is sent is made then, and nobody uses what is to be filled.
        self.synchronize(stream)?;
        let whole = |buffer: &CudaBuffer<R>| assert_eq!(buffer.element(), Element::F32, "as it lies on all ranks");
        let mut sends = Vec::new();
        for part in leaving {
            whole(part.buffer);
            let span = part.buffer.span(part.range.clone());
            sends.extend(part.to.iter().map(|&to| DeviceSend {
                to,
                tag: part.tag,
                span: span.clone(),
            }));
        }
        let mut spans = Vec::new();
        for target in &targets {
            whole(target.buffer);
            spans.extend(target.ranges.iter().map(|range| target.buffer.span(range.clone())));
        }
        let receives = arriving.iter().map(|part| DeviceReceive {
            from: part.from,
            tag: part.tag,
            span: spans[part.range].clone(),
        });
        Ok(plane.exchange_memory(&sends, &receives.collect::<Vec<_>>())?)
    }

    fn exchange_stored(
        &self,
        stream: &mut CudaStream<R>,
        fabric: &mut dyn Collective,
        buffer: &mut CudaBuffer<R>,
        leaving: &[Shared],
        arriving: &[Shared],
    ) -> Result<bool, StepError> {
        let Some(plane) = fabric.device_plane() else {
            return Ok(false);
        };
        self.synchronize(stream)?;
        let sends = leaving.iter().flat_map(|part| {
            part.to.iter().map(|&to| DeviceSend {
                to,
                tag: part.tag,
                span: buffer.span(part.range.clone()),
            })
        });
        let receives = arriving.iter().map(|part| DeviceReceive {
            from: part.from,
            tag: part.tag,
            span: buffer.span(part.range.clone()),
        });
        plane.exchange_memory(&sends.collect::<Vec<_>>(), &receives.collect::<Vec<_>>())?;
        Ok(true)
    }

    fn copies<const N: usize>(&self, buffers: [&CudaBuffer<R>; N]) -> Result<[CpuBuffer; N], DeviceError> {
        let mut stream = self.stream()?;
        all(|index| {
            let mut copy = CpuBuffer::zeroed(self.len(buffers[index]))?;
            self.download(&mut stream, buffers[index].into(), &mut copy)?;
            Ok(copy)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tarazed_kernels::Precision;
    use tarazed_kernels::cuda::recording::RecordingDriver;

    /// What arrives in a target lies where it belongs, and only there; what goes out is what lies there.
    fn round_trip<D: HostVisible>(device: &D, rounded: impl Fn(f32) -> f32) {
        let mut stream = device.stream().expect("a stream");
        let buffer = |precision| device.alloc(10, precision).expect("a buffer");
        let (mut working, mut full) = (buffer(Precision::Working), buffer(Precision::Full));
        let targets = vec![
            Target {
                buffer: &mut working,
                ranges: vec![1..3, 3..4, 8..10],
            },
            Target {
                buffer: &mut full,
                ranges: std::iter::once(0..2).collect(),
            },
        ];
        let arrived = device.receive(&mut stream, targets, |slices| -> Result<(), DeviceError> {
            let lengths: Vec<usize> = slices.iter().map(|slice| slice.len()).collect();
            assert_eq!(lengths, [2, 1, 2, 2]);
            for (number, element) in slices.into_iter().flatten().enumerate() {
                *element = 1.0 + (number as f32) / 1000.0;
            }
            Ok(())
        });
        arrived.expect("arrives");
        let value = |number: usize| 1.0 + (number as f32) / 1000.0;
        let expected = [
            0.0,
            value(0),
            value(1),
            value(2),
            0.0,
            0.0,
            0.0,
            0.0,
            value(3),
            value(4),
        ]
        .map(rounded);
        assert_eq!(
            device.outgoing(&mut stream, &working, 0..10).expect("goes out")[..],
            expected
        );
        let [copy, other] = device.copies([&full, &working]).expect("a copy");
        assert_eq!(copy[..3], [value(5), value(6), 0.0]);
        assert_eq!(other[..], expected);

        let target = Target {
            buffer: &mut full,
            ranges: std::iter::once(0..1).collect(),
        };
        let refused = device.receive(&mut stream, vec![target], |_| {
            Err(DeviceError::OutOfMemory {
                needed_bytes: 1,
                memory: None,
            })
        });
        assert!(refused.is_err());
    }

    #[test]
    fn elements_cross_to_the_host_and_back_on_every_device() {
        use tarazed_kernels::cuda::bf16;
        round_trip(&CpuDevice::new(), |value| value);
        let device = CudaDevice::new(RecordingDriver::new()).expect("a device");
        round_trip(&device, |value| bf16::widen(bf16::round(value)));
    }
}
