{{/* The deepsplit configuration: `config` of the values, and what follows from the chart's other values. */}}

{{/* Keys that the chart sets: where their value comes from. */}}
{{- define "deepsplit.derivedKeys" -}}
ray.address: the pods join their own Ray cluster; leave it out
ray.num_cpus: set resources.limits.cpu of the groups
gateway.host: gateways listen on their pod's address; leave it out
gateway.port: gateways listen on 8000; set service.rest.port for clients
gateway.grpc_port: gateways listen on 9000; set service.grpc.port for clients
gateway.replicas: set gateway.replicas (outside of config)
gateway.placement: set gateway.nodeSelector, gateway.tolerations or gateway.affinity
gateway.keys_file: set auth.tenants or auth.existingSecret
gateway.allow_anonymous: set auth.anonymous
gateway.tls: set tls.gateway
gateway.request_timeout_s: set longestStreamSeconds
gateway.drain_timeout_s: set longestStreamSeconds
attention.replicas: set attention.replicas (outside of config)
attention.autoscaling: set attention.autoscaling (outside of config)
attention.placement: set attention.nodeSelector, attention.tolerations or attention.affinity
experts.workers: set experts.groups.NAME.workers
experts.shares: set experts.groups.NAME.share
experts.placement: set experts.groups.NAME.nodeSelector, .tolerations or .affinity
experts.pools: set experts.groups
experts.device: set experts.groups.NAME.device
experts.autoscaling: set experts.groups.NAME.autoscaling
experts.threads: set experts.groups.NAME.resources.limits.cpu
experts.host: workers listen on their pod's address; leave it out
experts.max_per_node: each pod holds one worker; set experts.groups.NAME.workers
internal_tls: set tls.internal
monitoring.host: scrape targets listen on their pod's address; leave it out
monitoring.port: scrape targets take the ports from 9400 on, which the network policies open; leave it out
{{- end -}}

{{- define "deepsplit.refuseDerivedKeys" -}}
{{- range $path, $fix := fromYaml (include "deepsplit.derivedKeys" .) -}}
{{- $at := $.Values.config -}}
{{- $found := true -}}
{{- range $key := splitList "." $path -}}
{{- if and $found (kindIs "map" $at) (hasKey $at $key) -}}
{{- $at = get $at $key -}}
{{- else -}}
{{- $found = false -}}
{{- end -}}
{{- end -}}
{{- if $found -}}
{{- fail (printf "config.%s cannot be set here: %s" $path $fix) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Whole CPUs of a group, as its limit says. Call with (dict "name" "experts.groups.cpu" "group" $group). */}}
{{- define "deepsplit.cpus" -}}
{{- $cpu := toString .group.resources.limits.cpu -}}
{{- if not (regexMatch "^[1-9][0-9]*$" $cpu) -}}
{{- fail (printf "%s.resources.limits.cpu is %s, but compute threads are counted in whole CPUs: round it" .name $cpu) -}}
{{- end -}}
{{- $cpu -}}
{{- end -}}

{{/* The configuration as the pods get it, as YAML. attention.replicas is not in it: Serve changes that number in place,
     and a change of anything in here makes a new Ray cluster. */}}
{{- define "deepsplit.config" -}}
{{- include "deepsplit.refuseDerivedKeys" . -}}
{{- include "deepsplit.checks" . -}}
{{- $config := deepCopy .Values.config -}}
{{- $mounted := "/etc/deepsplit" -}}
{{- $gateway := merge (dict
      "host" "0.0.0.0" "port" 8000 "grpc_port" 9000
      "replicas" .Values.gateway.replicas
      "placement" (dict "resources" (dict "deepsplit-gateway" 1))
      "request_timeout_s" .Values.longestStreamSeconds
      "drain_timeout_s" .Values.longestStreamSeconds
    ) ($config.gateway | default dict) -}}
{{- if .Values.auth.anonymous -}}
{{- $_ := set $gateway "allow_anonymous" true -}}
{{- else -}}
{{- $_ := set $gateway "keys_file" (printf "%s/keys/keys.yaml" $mounted) -}}
{{- end -}}
{{- if ne .Values.tls.gateway.mode "disabled" -}}
{{- $_ := set $gateway "tls" (dict "cert_file" (printf "%s/tls/tls.crt" $mounted) "key_file" (printf "%s/tls/tls.key" $mounted)) -}}
{{- end -}}
{{- $attention := merge (dict "placement" (dict "resources" (dict "deepsplit-attention" 1))) ($config.attention | default dict) -}}
{{- with .Values.attention.autoscaling -}}
{{- if .enabled -}}
{{- $_ := set $attention "autoscaling" (dict
      "min_replicas" .minReplicas "max_replicas" .maxReplicas "target_occupancy" .targetOccupancy
      "upscale_delay_s" .upscaleDelaySeconds "downscale_delay_s" .downscaleDelaySeconds) -}}
{{- end -}}
{{- end -}}
{{- if and (ne ($attention.device | default "cpu") "cuda") (not $attention.threads) -}}
{{- $_ := set $attention "threads" (int (include "deepsplit.cpus" (dict "name" "attention" "group" .Values.attention))) -}}
{{- end -}}
{{- $experts := merge (dict "max_per_node" 1) ($config.experts | default dict) -}}
{{- $workers := 0 -}}
{{- $shares := list -}}
{{- $pools := list -}}
{{- range $name, $group := .Values.experts.groups -}}
{{- if $group.workers -}}
{{- $workers = add $workers $group.workers -}}
{{- range until (int $group.workers) -}}
{{- $shares = append $shares ($group.share | default 1) -}}
{{- end -}}
{{- $pool := dict "name" $name "workers" $group.workers "placement" (dict "resources" (dict (printf "deepsplit-experts-%s" $name) 1)) -}}
{{- if eq ($group.device | default "cpu") "cuda" -}}
{{- $_ := set $pool "device" "cuda" -}}
{{- else -}}
{{- $_ := set $pool "threads" (int (include "deepsplit.cpus" (dict "name" (printf "experts.groups.%s" $name) "group" $group))) -}}
{{- end -}}
{{- with $group.autoscaling -}}
{{- if .enabled -}}
{{- $scaling := dict -}}
{{- range $ours, $theirs := dict "min_workers" "minWorkers" "max_workers" "maxWorkers" "target_busy" "targetBusy" "upscale_delay_s" "upscaleDelaySeconds" "downscale_delay_s" "downscaleDelaySeconds" -}}
{{- if hasKey $group.autoscaling $theirs -}}{{- $_ := set $scaling $ours (get $group.autoscaling $theirs) -}}{{- end -}}
{{- end -}}
{{- $_ := set $pool "autoscaling" $scaling -}}
{{- end -}}
{{- end -}}
{{- $pools = append $pools $pool -}}
{{- end -}}
{{- end -}}
{{- $_ := set $experts "workers" $workers -}}
{{- $_ := set $experts "pools" $pools -}}
{{- if gt (len (uniq $shares)) 1 -}}{{- $_ := set $experts "shares" $shares -}}{{- end -}}
{{- $_ := set $config "gateway" $gateway -}}
{{- $_ := set $config "attention" $attention -}}
{{- $_ := set $config "experts" $experts -}}
{{- $_ := set $config "ray" (merge (dict "address" "auto") ($config.ray | default dict)) -}}
{{- if ne .Values.tls.internal.mode "disabled" -}}
{{- $_ := set $config "internal_tls" (dict
      "cert_file" (printf "%s/internal-tls/tls.crt" $mounted) "key_file" (printf "%s/internal-tls/tls.key" $mounted)
      "ca_file" (printf "%s/internal-tls/ca.crt" $mounted)) -}}
{{- end -}}
{{- toYaml $config -}}
{{- end -}}

{{/* The same for people and `deepsplit plan`: complete, with the number of attention replicas. */}}
{{- define "deepsplit.wholeConfig" -}}
{{- $config := fromYaml (include "deepsplit.config" .) -}}
{{- $_ := set $config.attention "replicas" .Values.attention.replicas -}}
{{- toYaml $config -}}
{{- end -}}

{{- define "deepsplit.serveConfig" -}}
proxy_location: Disabled # gateways listen themselves
applications:
  - name: deepsplit
    import_path: deployments.app:build
    route_prefix: /
    args:
      config:
        {{- include "deepsplit.config" . | nindent 8 }}
    {{- if not .Values.attention.autoscaling.enabled }}
      fixed_attention: true # its number is below
    deployments:
      - name: attention
        num_replicas: {{ .Values.attention.replicas }}
    {{- end }}
{{- end -}}
