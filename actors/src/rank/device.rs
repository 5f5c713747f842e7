//! Which device a rank computes on: what `cluster.device` says, and what this machine has.

use tarazed_domain::config::{ClusterDevice, Config, ConfigError};
use tarazed_kernels::{CpuDevice, Device};

#[cfg(feature = "cuda")]
use {
    super::RankError,
    std::sync::Arc,
    tarazed_domain::config::ClusterCollective,
    tarazed_fabric::nccl::DeviceMeans,
    tarazed_fabric::nccl::agreement::host_identity,
    tarazed_kernels::cuda::CudaDevice,
    tarazed_kernels::cuda::cubin::CubinCache,
    tarazed_kernels::cuda::driver::Absence,
    tarazed_kernels::cuda::nccl::{Nccl, RealNccl},
    tarazed_kernels::cuda::peak::dense_bf16_flops_per_s,
    tarazed_kernels::cuda::real::{self, RealDriver},
    tarazed_kernels::cuda::shapes,
    tarazed_train::device_thread::{DataPlane, DeviceSockets, Sockets},
};

/// A device that was asked for and is not to be had: reconfigure.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{cause}; set cluster.device to \"cpu\", or {remedy}")]
pub struct DeviceRefused {
    /// One line.
    pub cause: String,
    /// What else to do.
    pub remedy: &'static str,
}

/// What ranks of a run compute on, on this machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DeviceChoice {
    /// The processors.
    Cpu,
    /// CUDA devices, so many.
    #[cfg(feature = "cuda")]
    Cuda {
        /// At least one.
        count: u32,
    },
}

impl DeviceChoice {
    /// What the config asks for, where this machine has it.
    ///
    /// # Errors
    /// [`DeviceRefused`] where it asks for a CUDA device and there is none that can be used.
    pub fn of(config: &Config) -> Result<Self, DeviceRefused> {
        match config.cluster.device {
            ClusterDevice::Cpu => Ok(Self::Cpu),
            ClusterDevice::Auto => Ok(Self::cuda().unwrap_or(Self::Cpu)),
            ClusterDevice::Cuda => Self::cuda(),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda() -> Result<Self, DeviceRefused> {
        let found = real::device_count().and_then(|count| real::probe(0).map(|_| Self::Cuda { count }));
        found.map_err(refused)
    }

    #[cfg(not(feature = "cuda"))]
    fn cuda() -> Result<Self, DeviceRefused> {
        Err(DeviceRefused {
            cause: "no CUDA device: this program was built without the feature `cuda`".to_owned(),
            remedy: "build it with that feature",
        })
    }

    /// Why a device that is there is not used, where `auto` took the processors: a missing library is easily put right. None
    /// where there is no device.
    #[must_use]
    pub fn unused_device() -> Option<String> {
        #[cfg(feature = "cuda")]
        if real::device_count().is_ok() {
            return real::probe(0).err().map(|absence| absence.to_string());
        }
        None
    }

    /// Whether it takes a config's shapes. Products are the matrix library's to refuse, which a rank asks when it opens its
    /// device.
    ///
    /// # Errors
    /// The key at fault, with what is possible.
    #[cfg_attr(
        not(feature = "cuda"),
        expect(unused_variables, reason = "processors take any shape")
    )]
    pub fn takes(self, config: &Config) -> Result<(), ConfigError> {
        match self {
            Self::Cpu => Ok(()),
            #[cfg(feature = "cuda")]
            Self::Cuda { .. } => shapes::check(config),
        }
    }

    /// Does once what each rank would do at its start, and wait for: compiles the kernels.
    ///
    /// # Errors
    /// [`DeviceRefused`] where they do not compile.
    pub fn prepare(self) -> Result<(), DeviceRefused> {
        match self {
            Self::Cpu => Ok(()),
            #[cfg(feature = "cuda")]
            Self::Cuda { .. } => real::prepare(0, &cubins()).map_err(refused),
        }
    }

    /// As a run's resolved config says it: a restart computes on the same kind of device or is refused.
    #[must_use]
    pub const fn resolved(self) -> ClusterDevice {
        match self {
            Self::Cpu => ClusterDevice::Cpu,
            #[cfg(feature = "cuda")]
            Self::Cuda { .. } => ClusterDevice::Cuda,
        }
    }
}

/// What DET-4 compares, as the controller's machine has it; ranks of one run compute on devices of one kind.
#[must_use]
pub fn device_type(config: &Config) -> String {
    match DeviceChoice::of(config) {
        Ok(DeviceChoice::Cpu) => CpuDevice::new().device_type(),
        #[cfg(feature = "cuda")]
        Ok(DeviceChoice::Cuda { .. }) => match real::probe(0) {
            Ok(facts) => facts.device_type(),
            Err(absence) => absence.to_string(),
        },
        // A run on it would not have started: whatever stands here is declared as a change.
        Err(refused) => refused.cause,
    }
}

/// Peak rate of the devices that a run's ranks compute on.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct DevicePeak {
    /// Of one device: dense products in the working precision, FLOP/s.
    pub flops_per_s: f64,
    /// How many there are: worker k takes that of number k modulo this count.
    pub devices: u32,
}

impl DevicePeak {
    /// Of all the devices that so many ranks compute on, FLOP/s.
    #[must_use]
    pub fn of_ranks(self, ranks: usize) -> f64 {
        self.flops_per_s * ranks.min(self.devices as usize) as f64
    }
}

/// The peak of the devices that ranks compute on, as the controller's machine has them; none for processors, and for a
/// device that is not in the table ([`tarazed_kernels::cuda::peak`]).
#[must_use]
pub fn peak(config: &Config) -> Option<DevicePeak> {
    match DeviceChoice::of(config) {
        #[cfg(feature = "cuda")]
        Ok(DeviceChoice::Cuda { count: devices }) => {
            let name = real::probe(0).ok()?.name;
            dense_bf16_flops_per_s(&name).map(|flops_per_s| DevicePeak { flops_per_s, devices })
        }
        _ => None,
    }
}

#[cfg(feature = "cuda")]
fn refused(absence: Absence) -> DeviceRefused {
    // What a person reads is one line; a compiler's log has more.
    if let Absence::Failed(error) = &absence {
        tracing::warn!(%error, "the CUDA device cannot be used");
    }
    DeviceRefused {
        cause: absence.to_string(),
        remedy: "make the device and CUDA's libraries visible to this process",
    }
}

#[cfg(feature = "cuda")]
fn cubins() -> CubinCache {
    CubinCache::new(CubinCache::default_folder(|name| {
        std::env::var_os(name).map(Into::into)
    }))
}

/// Opens the CUDA device of this number.
#[cfg(feature = "cuda")]
pub(super) fn open(ordinal: u32) -> Result<CudaDevice<RealDriver>, RankError> {
    let driver = RealDriver::open(ordinal, cubins()).map_err(|e| RankError::because("device")(&e))?;
    CudaDevice::new(driver).map_err(|e| RankError::because("device")(&e))
}

/// The data plane of a rank on a CUDA device.
#[cfg(feature = "cuda")]
pub(super) fn data_plane(config: &Config, sockets: Sockets, device: &CudaDevice<RealDriver>) -> Box<dyn DataPlane> {
    let required = match config.cluster.collective {
        // It takes no part in the ranks' agreement; all of them have the same config.
        ClusterCollective::Sockets => return Box::new(sockets),
        ClusterCollective::Auto => false,
        ClusterCollective::Nccl => true,
    };
    let means = DeviceMeans {
        device: device.clone(),
        library: RealNccl::open().map(|library| -> Arc<dyn Nccl> { Arc::new(library) }),
        host: host_identity(),
    };
    Box::new(DeviceSockets {
        sockets,
        means,
        required,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn config(device: ClusterDevice) -> Config {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/quickstart.toml");
        let mut config = Config::load(path.as_ref(), &[]).unwrap();
        config.cluster.device = device;
        config
    }

    #[test]
    fn utilisation_is_a_share_of_the_devices_in_use() {
        let peak = DevicePeak {
            flops_per_s: 1e15,
            devices: 4,
        };
        assert_eq!([1, 4, 8].map(|ranks| peak.of_ranks(ranks)), [1e15, 4e15, 4e15]);
        assert_eq!(super::peak(&config(ClusterDevice::Cpu)), None);
    }

    /// Processors take any shape; a CUDA device says before a run begins what it does not take.
    #[cfg(feature = "cuda")]
    #[test]
    fn shapes_are_refused_by_the_device_that_would_compute_them() {
        let mut wide = config(ClusterDevice::Cuda);
        wide.model.hidden = 256 * wide.model.heads;
        DeviceChoice::Cpu.takes(&wide).unwrap();
        let cuda = DeviceChoice::Cuda { count: 1 };
        cuda.takes(&config(ClusterDevice::Cuda)).unwrap();
        let refused = cuda.takes(&wide).unwrap_err();
        assert_eq!(refused.key, "model.heads");
    }

    /// With a GPU or without, each answer fits the machine and the others.
    #[test]
    fn what_is_asked_for_is_had_or_refused_in_one_line() {
        assert_eq!(DeviceChoice::of(&config(ClusterDevice::Cpu)), Ok(DeviceChoice::Cpu));
        assert_eq!(device_type(&config(ClusterDevice::Cpu)), CpuDevice::new().device_type());
        let auto = DeviceChoice::of(&config(ClusterDevice::Auto)).unwrap();
        match DeviceChoice::of(&config(ClusterDevice::Cuda)) {
            Ok(cuda) => assert_eq!((auto, cuda.resolved()), (cuda, ClusterDevice::Cuda)),
            Err(refused) => {
                let line = refused.to_string();
                assert!(line.starts_with("no CUDA device") && !line.contains('\n'), "{line}");
                assert!(line.contains("cluster.device"), "{line}");
                assert_eq!(auto, DeviceChoice::Cpu);
                assert_eq!(auto.resolved(), ClusterDevice::Cpu);
            }
        }
    }
}
