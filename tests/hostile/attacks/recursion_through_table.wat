;; Recurses through a table. Traps: its stack is used up.
(module
  (memory (export "memory") 1)
  (type $f (func (param i32) (result i32)))
  (table funcref (elem $down))
  (func $down (type $f) (i32.add (call_indirect (type $f) (local.get 0) (i32.const 0)) (i32.const 1)))
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32)
    (call $down (i32.const 0))))
