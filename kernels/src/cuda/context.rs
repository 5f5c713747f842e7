//! What all streams and buffers of one device share: the driver, the kernels and plans made ready so far, and whether the
//! device is lost.
//!
//! After an error that outlives its call the device refuses all further work and repeats the cause: what a lost context
//! would answer tells nothing, and what it computed last is not to be trusted.

use super::driver::{Driver, DriverError, GemmKey, GemmPlan, KernelId, Severity, StreamId, remedy};
use super::table::{ENTRIES, Entry};
use crate::device::DeviceError;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Shared by a device's streams and buffers.
pub struct Context<D: Driver> {
    driver: D,
    lost: Mutex<Option<String>>,
    /// By name of the entry point; all of them.
    kernels: BTreeMap<&'static str, KernelId>,
    plans: Mutex<BTreeMap<GemmKey, Arc<GemmPlan>>>,
    /// Where fresh memory is zeroed.
    home: StreamId,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<D: Driver> Context<D> {
    /// Takes a driver into use and makes every kernel ready, so that none fails to compile in the middle of a run.
    ///
    /// # Errors
    /// [`DeviceError::Failed`], with the compiler's log where a kernel does not compile.
    pub(super) fn new(driver: D) -> Result<Self, DeviceError> {
        let mut kernels = BTreeMap::new();
        for &entry in ENTRIES {
            let kernel = driver.load(entry).map_err(|error| failed(entry.name, &error))?;
            kernels.insert(entry.name, kernel);
        }
        let home = driver.create_stream().map_err(|error| failed("start", &error))?;
        Ok(Self {
            driver,
            lost: Mutex::default(),
            kernels,
            plans: Mutex::default(),
            home,
        })
    }

    /// The driver, for facts about the device; work goes through [`Context::ask`].
    pub(super) const fn driver(&self) -> &D {
        &self.driver
    }

    /// Where fresh memory is zeroed.
    pub(super) const fn home(&self) -> StreamId {
        self.home
    }

    /// Asks the driver, unless the device is lost, and remembers an error that outlives the call.
    ///
    /// # Errors
    /// [`DeviceError::Failed`].
    pub(super) fn ask<T>(
        &self,
        operation: &'static str,
        call: impl FnOnce(&D) -> Result<T, DriverError>,
    ) -> Result<T, DeviceError> {
        self.check(operation)?;
        call(&self.driver).map_err(|error| self.judge(operation, &error))
    }

    /// # Errors
    /// [`DeviceError::Failed`] if the device is lost.
    pub(super) fn check(&self, operation: &'static str) -> Result<(), DeviceError> {
        match &*lock(&self.lost) {
            None => Ok(()),
            Some(cause) => Err(DeviceError::Failed {
                operation,
                cause: format!("the device was lost before: {cause}"),
            }),
        }
    }

    /// What an error means for whoever asked; a sticky one ends all further work.
    pub(super) fn judge(&self, operation: &'static str, error: &DriverError) -> DeviceError {
        let failed = failed(operation, error);
        if let (Severity::Sticky, DeviceError::Failed { cause, .. }) = (error.severity, &failed) {
            lock(&self.lost).get_or_insert_with(|| format!("{cause} (in {operation})"));
        }
        failed
    }

    /// A kernel.
    pub(super) fn kernel(&self, entry: &'static Entry) -> KernelId {
        match self.kernels.get(entry.name) {
            Some(&kernel) => kernel,
            None => unreachable!("every entry of the table is loaded"),
        }
    }

    /// The plan of a matrix product, made at its first use and kept (DET-2).
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] where there is none of that shape, [`DeviceError::Failed`].
    pub(super) fn plan(&self, key: &GemmKey) -> Result<Arc<GemmPlan>, DeviceError> {
        let mut plans = lock(&self.plans);
        if let Some(plan) = plans.get(key) {
            return Ok(Arc::clone(plan));
        }
        self.check("gemm")?;
        let plan = self.driver.plan_gemm(key).map_err(|error| match error.severity {
            Severity::Refused => DeviceError::Unsupported {
                operation: "gemm",
                cause: format!(
                    "{error} for {key:?}; change the model's shape or batch.micro_batch_sequences, or set cluster.device to \"cpu\""
                ),
            },
            Severity::OutOfMemory | Severity::Sticky => self.judge("gemm", &error),
        })?;
        let plan = Arc::new(plan);
        plans.insert(*key, Arc::clone(&plan));
        Ok(plan)
    }

    /// All plans made so far, in order of their shapes.
    pub(super) fn plans(&self) -> Vec<(GemmKey, Arc<GemmPlan>)> {
        let plans = lock(&self.plans);
        plans.iter().map(|(key, plan)| (*key, Arc::clone(plan))).collect()
    }
}

fn failed(operation: &'static str, error: &DriverError) -> DeviceError {
    let cause = match error.severity {
        Severity::Sticky => format!("{error}; {}", remedy(&error.name)),
        Severity::OutOfMemory | Severity::Refused => error.to_string(),
    };
    DeviceError::Failed { operation, cause }
}

impl<D: Driver> Drop for Context<D> {
    fn drop(&mut self) {
        // Nobody is left to tell of a failure, and the process gives back what this does not.
        let _ = self.driver.destroy_stream(self.home);
    }
}
