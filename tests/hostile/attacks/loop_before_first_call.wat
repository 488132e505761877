;; Computes for ever before any host call, with fuel for minutes. Its time to the first call runs out.
(module
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32)
    (loop $l (br $l)) (unreachable)))
